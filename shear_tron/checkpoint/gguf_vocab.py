"""A folder's tokenizer as GGUF metadata: what llama.cpp's converter writes for byte-level BPE and for SentencePiece."""

import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import gguf
from pydantic import BaseModel, Field, RootModel, ValidationError

from shear_tron.checkpoint.config_json import Flag
from shear_tron.checkpoint.safetensors_stream import read_json
from shear_tron.reading import explain, in_one_line, read_sentencepiece, require_files, short

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


Id = Annotated[int, Field(ge=0, lt=2**31)]
Json = TypeVar("Json", bound=BaseModel)


class AddedToken(BaseModel):
    content: str
    special: Flag = False


class TokenizerConfig(BaseModel):
    """What is read of a ``tokenizer_config.json``."""

    add_prefix_space: bool | None = None
    added_tokens_decoder: dict[Id, AddedToken] = {}


class AddedTokens(RootModel[dict[str, Id]]):
    """``added_tokens.json``."""

    root: dict[str, Id] = {}


class PreTokenizer(BaseModel):
    """How a ``tokenizer.json`` cuts text: in one step, or in those of ``pretokenizers``."""

    type: str
    pretokenizers: list["PreTokenizer"] = []
    behavior: str | None = None
    pattern: dict[str, str] = {}
    individual_digits: Flag = False
    use_regex: bool = True


class Bpe(BaseModel):
    byte_fallback: Flag = False
    vocab: dict[str, Id]
    merges: list[str | list[str]] = []


class NumberedToken(AddedToken):
    id: Id


class TokenizerJson(BaseModel):
    """What is read of a ``tokenizer.json``."""

    model: Bpe
    pre_tokenizer: PreTokenizer | None = None
    added_tokens: list[NumberedToken] = []


def _read(kind: type[Json], file: Path) -> Json:
    """ValueError where the file is damaged; where there is none, what it would be if it said nothing."""
    return _valid(kind, read_json(file) if file.exists() else {}, file)


def _valid(kind: type[Json], values: dict[str, Any], file: Path) -> Json:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{file} is damaged ({explain(error)}); fetch it again") from None


def add_vocabulary(writer: Any, folder: Path, rows: int) -> None:
    """Add the tokenizer of a Hugging Face folder; ids beyond it, up to the embedding's ``rows``, are padding.

    ValueError for a tokenizer that llama.cpp is not known to have: better none than one that encodes differently.
    """
    require_files(folder)
    config = _read(TokenizerConfig, folder / "tokenizer_config.json")
    if config.add_prefix_space is not None:
        writer.add_add_space_prefix(config.add_prefix_space)
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
    try:
        gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=rows).add_to_gguf(writer, quiet=True)
    except Exception as error:  # whatever it comes upon in files that it reads by itself
        raise ValueError(
            f"{folder}: its special tokens cannot be read ({in_one_line(error)}); fetch it again"
        ) from None


class Entry(NamedTuple):
    token: bytes
    score: float  # of SentencePiece: of two possible merges the higher comes first
    type: int


def _padding(rows: int) -> list[Entry]:
    return [Entry(f"[PAD{i}]".encode(), -10000.0, int(gguf.TokenType.UNUSED)) for i in range(rows)]


def _sentencepiece(folder: Path, config: TokenizerConfig, rows: int) -> list[Entry]:
    library = read_sentencepiece(folder / "tokenizer.model")
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
    for token, i in _read(AddedTokens, folder / "added_tokens.json").root.items():
        if i < rows:
            found[i] = Entry(token.encode(), -1000.0, int(types.USER_DEFINED))
    for i, added in config.added_tokens_decoder.items():
        if i < rows:
            found[i] = _added(added.content, added.special)
    return found


def _tokenizer_json(folder: Path, rows: int) -> tuple[str, str, list[Entry]]:
    """(llama.cpp's kind, pre-tokenizer, entries) of a ``tokenizer.json``."""
    values = read_json(folder / "tokenizer.json")
    kind = values["model"].get("type", "BPE") if isinstance(values.get("model"), dict) else "BPE"
    if kind != "BPE":  # others need not have a vocabulary like BPE's
        raise ValueError(f"{folder}: a tokenizer of type {short(kind)} is not written as GGUF; use BPE")
    content = _valid(TokenizerJson, values, folder / "tokenizer.json")
    model = content.model
    pieces = model.byte_fallback  # SentencePiece's BPE, as LLaMA-2 has it
    pre = "default" if pieces else _pre_tokenizer(folder, content.pre_tokenizer)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.merges]
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), number)
    found = _padding(rows)
    for token, i in model.vocab.items():
        is_byte = pieces and re.fullmatch("<0x[0-9A-F]{2}>", token)
        token_type = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
        if i < rows:
            found[i] = Entry(token.encode(), -float(rank.get(token, len(rank))), int(token_type))
    for added in content.added_tokens:
        if added.id < rows:
            found[added.id] = _added(added.content, added.special)
    return "llama" if pieces else "gpt2", pre, found


def _added(token: str, special: bool) -> Entry:
    looks_special = (token.startswith("<|") and token.endswith("|>")) or token in ("<pad>", "<mask>")
    if special or looks_special:
        return Entry(token.encode(), -1000.0, int(gguf.TokenType.CONTROL))
    return Entry(token.replace("\u2581", " ").encode(), -1000.0, int(gguf.TokenType.USER_DEFINED))


def _pre_tokenizer(folder: Path, description: PreTokenizer | None) -> str:
    parts = [] if description is None else description.pretokenizers or [description]
    steps = []
    for part in parts:
        if part.type == "Split" and part.behavior == "Isolated" and "Regex" in part.pattern:
            steps.append(part.pattern["Regex"])
        elif part.type == "Digits" and part.individual_digits:
            steps.append("digits")
        elif part.type == "ByteLevel":
            steps += ["byte level"] if part.use_regex else []
        else:
            steps.append(part.type)
    name = PRE_TOKENIZERS.get(tuple(steps))
    if name is None:
        raise ValueError(
            f"{folder}: how this tokenizer cuts text ({', '.join(steps) or 'not at all'}) is not known to be in "
            f"llama.cpp; known are {', '.join(PRE_TOKENIZERS.values())}. Export to Hugging Face and use its converter"
        )
    return name
