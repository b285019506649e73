"""Text to token ids, always by the tokenizer's own library.

A ``tokenizer.json`` goes through `tokenizers`, a SentencePiece ``tokenizer.model`` through `sentencepiece` itself:
converting one into the other changes ids (merge order, white-space runs) in most documents.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from shear_tron.hub import located
from shear_tron.reading import in_one_line, read_json, read_sentencepiece, read_text


class Tokenizer:
    """A tokenizer.json, a SentencePiece ``*.model`` file, or a folder or Hub id that holds one (tokenizer.json first).

    Text that spells a special token ("<|endoftext|>") is encoded as plain text, and no post-processor runs: which
    special tokens a document gets is decided by whoever calls, never by the text.

    ``sha256`` is its fingerprint, ``vocab`` the largest id plus one; ``bos`` and ``eos`` are token strings or None.
    Raises ValueError when no tokenizer is there.
    """

    def __init__(self, path: str):
        self.path = path
        file = find(path)
        self.sha256 = fingerprint(path)
        if file.suffix == ".json":
            self._load_json(file)
        else:
            self._load_sentencepiece(file)

    def _load_json(self, file: Path) -> None:
        from tokenizers import Tokenizer as Library

        parts = read_json(file)
        try:
            self._library: Any = Library.from_str(read_text(file))
        except BaseException as error:  # the library raises bare Exception, and where it panics not even that
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = in_one_line(error)
            raise ValueError(f"tokenizer={file} cannot be read ({reason}); use a complete tokenizer.json") from None
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        self._ids: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        self.vocab = max(self._ids.values(), default=-1) + 1
        self.bos, self.eos = (_special_token(file.parent, name) for name in ("bos_token", "eos_token"))
        self._encode = self._encode_json
        pieces = bool(parts["model"].get("byte_fallback"))
        byte_level = "ByteLevel" in json.dumps(parts.get("decoder") or {})
        self._is_byte_level: bool | None = None if pieces == byte_level else byte_level
        self._special = {added["id"] for added in parts.get("added_tokens", []) if added.get("special")}

    def _load_sentencepiece(self, file: Path) -> None:
        self._library = read_sentencepiece(file)
        self.vocab = self._library.vocab_size()
        self._ids = {self._library.id_to_piece(i): i for i in range(self.vocab)}
        self.bos, self.eos = (
            self._library.id_to_piece(i) if i >= 0 else None for i in (self._library.bos_id(), self._library.eos_id())
        )
        self._encode = self._encode_sentencepiece
        self._is_byte_level = False
        self._special = {i for i in range(self.vocab) if self._library.is_control(i) or self._library.is_unknown(i)}

    def _encode_json(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_sentencepiece(self, texts: list[str]) -> list[list[int]]:
        return cast(list[list[int]], self._library.encode(texts, num_threads=1))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with no special tokens added."""
        return self._encode(list(texts))

    def byte_lengths(self) -> list[int] | None:
        """Bytes of text that each id spells, 0 for special tokens; None for a tokenizer whose tokens do not say.

        SentencePiece's dummy space at the start of a document counts as one.
        """
        if self._is_byte_level is None:
            return None
        lengths = [0] * self.vocab
        for token, i in self._ids.items():
            if i in self._special:
                continue
            if self._is_byte_level:  # every character stands for a byte
                lengths[i] = len(token)
            elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("\u2581", " ").encode())
        return lengths

    def id(self, token: str) -> int:
        """The id of a token string. Raises ValueError for a token that is not in the vocabulary."""
        if token not in self._ids:
            near = difflib.get_close_matches(token, [t for t in self._ids if t.startswith(token[:1])], n=3, cutoff=0.3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"token {token!r} is not in the vocabulary of tokenizer={self.path}{hint}")
        return self._ids[token]


def find(path: str) -> Path:
    """The tokenizer file at ``path``, in that folder, or of that Hub id. Raises ValueError when there is none."""
    given, path = path, located(path)
    if Path(path).is_file():
        return Path(path)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (Path(path) / name).is_file():
            return Path(path) / name
    raise ValueError(f"tokenizer={given} is not a tokenizer; give a tokenizer.json, a tokenizer.model or their folder")


def fingerprint(path: str) -> str:
    """sha256 of what decides the ids, so that a re-saved or re-indented tokenizer.json keeps it."""
    file = find(path)
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            parts = read_json(file)
            content = json.dumps({key: parts[key] for key in parts if key not in _INDECISIVE}, sort_keys=True).encode()
        except ValueError as error:
            raise ValueError(f"tokenizer={error}; use a complete tokenizer.json") from None
    return hashlib.sha256(content).hexdigest()


# Parts of a tokenizer.json that do not change the ids of plain text.
_INDECISIVE = {"version", "truncation", "padding", "post_processor", "decoder"}


def _special_token(folder: Path, name: str) -> str | None:
    """What a Hugging Face folder calls its ``bos_token`` or ``eos_token``."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            token = read_json(folder / file).get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                return str(token)
    return None


@cache
def load(path: str) -> Tokenizer:
    """The tokenizer at ``path``, read once a process."""
    return Tokenizer(path)
