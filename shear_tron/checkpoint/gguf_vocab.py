"""A folder's tokenizer as GGUF metadata: what llama.cpp's converter writes for byte-level BPE and for SentencePiece."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from shear_tron.checkpoint.safetensors_stream import read_json

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"

# How text is cut before BPE -> llama.cpp's name of it. llama.cpp has these expressions in its code, not in the file.
PRE_TOKENIZERS = {
    (f"{_ENDINGS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (f"{_ENDINGS}|{_WORDS}|\\p{{N}}|{_REST}",): "qwen2",
    ("digits", "byte level"): "smollm",
    ("byte level",): "gpt-2",
}


def add_vocabulary(writer: Any, folder: Path, rows: int) -> None:
    """Add the tokenizer of a Hugging Face folder; ids beyond it, up to the embedding's ``rows``, are padding.

    ValueError for a tokenizer that llama.cpp is not known to have: better none than one that encodes differently.
    """
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if config.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(bool(config["add_prefix_space"]))
    if (folder / "tokenizer.model").exists():
        kind, pre, entries = "llama", "default", _sentencepiece(folder, config, rows)
    else:
        kind, pre, entries = _tokenizer_json(folder, rows)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([entry.token for entry in entries])
    if kind == "llama":
        writer.add_token_scores([entry.score for entry in entries])
    writer.add_token_types([entry.type for entry in entries])
    gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=rows).add_to_gguf(writer, quiet=True)


class Entry(NamedTuple):
    token: bytes
    score: float  # of SentencePiece: of two possible merges the higher comes first
    type: int


def _padding(rows: int) -> list[Entry]:
    return [Entry(f"[PAD{i}]".encode(), -10000.0, int(gguf.TokenType.UNUSED)) for i in range(rows)]


def _sentencepiece(folder: Path, config: dict[str, Any], rows: int) -> list[Entry]:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromFile(str(folder / "tokenizer.model"))
    types = gguf.TokenType
    kinds = (
        (library.IsUnknown, types.UNKNOWN),
        (library.IsControl, types.CONTROL),
        (library.IsUnused, types.UNUSED),
        (library.IsByte, types.BYTE),
    )
    found = _padding(rows)
    for i in range(min(library.vocab_size(), rows)):
        kind = next((kind for is_of, kind in kinds if is_of(i)), types.NORMAL)
        found[i] = Entry(library.IdToPiece(i).encode(), library.GetScore(i), int(kind))
    added = folder / "added_tokens.json"
    for token, i in (read_json(added) if added.exists() else {}).items():
        if i < rows:
            found[i] = Entry(token.encode(), -1000.0, int(types.USER_DEFINED))
    for key, value in config.get("added_tokens_decoder", {}).items():
        if int(key) < rows:
            found[int(key)] = _added(value["content"], bool(value.get("special")))
    return found


def _tokenizer_json(folder: Path, rows: int) -> tuple[str, str, list[Entry]]:
    """(llama.cpp's kind, pre-tokenizer, entries) of a ``tokenizer.json``."""
    content = read_json(folder / "tokenizer.json")
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{folder}: a tokenizer of type {model['type']} is not written as GGUF; use BPE")
    pieces = bool(model.get("byte_fallback"))  # SentencePiece's BPE, as LLaMA-2 has it
    pre = "default" if pieces else _pre_tokenizer(folder, content.get("pre_tokenizer"))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), number)
    found = _padding(rows)
    for token, i in model["vocab"].items():
        is_byte = pieces and re.fullmatch("<0x[0-9A-F]{2}>", token)
        kind = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
        if i < rows:
            found[i] = Entry(token.encode(), -float(rank.get(token, len(rank))), int(kind))
    for added in content.get("added_tokens", []):
        if added["id"] < rows:
            found[added["id"]] = _added(added["content"], bool(added.get("special")))
    return "llama" if pieces else "gpt2", pre, found


def _added(token: str, special: bool) -> Entry:
    looks_special = (token.startswith("<|") and token.endswith("|>")) or token in ("<pad>", "<mask>")
    if special or looks_special:
        return Entry(token.encode(), -1000.0, int(gguf.TokenType.CONTROL))
    return Entry(token.replace("\u2581", " ").encode(), -1000.0, int(gguf.TokenType.USER_DEFINED))


def _pre_tokenizer(folder: Path, description: dict[str, Any] | None) -> str:
    parts = (description or {}).get("pretokenizers", [description] if description else [])
    steps = []
    for part in parts:
        if part["type"] == "Split" and part.get("behavior") == "Isolated" and "Regex" in part["pattern"]:
            steps.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part.get("individual_digits"):
            steps.append("digits")
        elif part["type"] == "ByteLevel":
            steps += ["byte level"] if part.get("use_regex", True) else []
        else:
            steps.append(part["type"])
    name = PRE_TOKENIZERS.get(tuple(steps))
    if name is None:
        raise ValueError(
            f"{folder}: how this tokenizer cuts text ({', '.join(steps) or 'not at all'}) is not known to be in "
            f"llama.cpp; known are {', '.join(PRE_TOKENIZERS.values())}. Export to Hugging Face and use its converter"
        )
    return name
