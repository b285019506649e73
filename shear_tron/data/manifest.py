"""``domains.json``: what a prepared folder holds, and whether it is whole."""

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shear_tron.data.tokenizer import fingerprint
from shear_tron.files import sha256, write_atomically

FILE = "domains.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One ``.ds`` file (datatrove's format: raw little-endian ids) and its ``.ds.index`` (uint64 document ends)."""

    file: str  # relative to the folder
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Domain:
    """A domain's shards in reading order. ``held_out`` is never trained on."""

    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]
    source: str = ""
    licence: str = ""
    empty: int = 0  # documents without text, left out
    damaged: int = 0  # records that could not be read, left out
    duplicates: int | None = None  # documents left out because the same text came before; None: nobody looked

    def tokens(self, split: Literal["train", "held_out"] = "train") -> int:
        return sum(shard.tokens for shard in getattr(self, split))

    def documents(self, split: Literal["train", "held_out"] = "train") -> int:
        return sum(shard.documents for shard in getattr(self, split))


@dataclass(frozen=True)
class Manifest:
    """A prepared folder.

    ``vocab`` is the tokenizer's largest id plus one, ``token_bytes`` 2 or 4, ``bos`` and ``separator`` the ids that
    open and close every document (None: not added).
    """

    folder: str
    tokenizer: str
    tokenizer_sha256: str
    vocab: int
    token_bytes: int
    bos: int | None
    separator: int | None
    held_out_share: float
    domains: dict[str, Domain]

    @classmethod
    def read(cls, folder: str, tokenizer: str | None = None, vocab: int | None = None) -> "Manifest":
        """Read ``folder/domains.json`` and check the size of every shard (no shard is opened).

        ``tokenizer`` is the model's tokenizer (file or folder) and ``vocab`` the rows of its embedding: ValueError
        when the data was not made for them. A model may have more rows than ids, as padded embeddings do, by a
        sixteenth at most. ValueError too for a folder that was never prepared, or a missing or truncated shard.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise ValueError(f"data folder {folder} holds no {FILE}; make it with `shear-tron prepare`")
        try:
            content = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is damaged ({error}); run `shear-tron prepare` again") from error
        if content.get("format") != FORMAT:
            raise ValueError(f"{file} has format={content.get('format')}, not {FORMAT}; run `shear-tron prepare` again")
        manifest = cls._from_json(folder, content)
        manifest._check_model(tokenizer, vocab)
        for domain in manifest.domains.values():
            for shard in (*domain.train, *domain.held_out):
                manifest._check_size(shard)
        return manifest

    @classmethod
    def _from_json(cls, folder: str, content: dict[str, Any]) -> "Manifest":
        fields = {key: value for key, value in content.items() if key not in ("format", "domains")}
        domains = {}
        for name, domain in content["domains"].items():
            train, held_out = (tuple(Shard(**shard) for shard in domain.pop(split)) for split in ("train", "held_out"))
            domains[name] = Domain(train, held_out, **domain)
        return cls(folder=folder, domains=domains, **fields)

    def write(self) -> None:
        """Write ``domains.json`` in one step: a reader sees the old file or the new one."""
        content = {"format": FORMAT, **{key: value for key, value in asdict(self).items() if key != "folder"}}
        write_atomically(Path(self.folder) / FILE, json.dumps(content, indent=1) + "\n")

    def _check_model(self, tokenizer: str | None, vocab: int | None) -> None:
        if vocab is not None and not self.vocab <= vocab <= self.vocab + self.vocab // 16:
            raise ValueError(
                f"the model's vocab={vocab} does not fit data made with the {self.vocab} ids of {self.tokenizer}; "
                "prepare the data with the model's tokenizer"
            )
        if tokenizer is not None and (found := fingerprint(tokenizer)) != self.tokenizer_sha256:
            raise ValueError(
                f"tokenizer={tokenizer} ({found[:12]}) is not the one that made {self.folder} "
                f"({self.tokenizer}, {self.tokenizer_sha256[:12]}); prepare the data with the model's tokenizer"
            )

    def _check_size(self, shard: Shard) -> None:
        for file, expected in (
            (shard.file, shard.tokens * self.token_bytes),
            (f"{shard.file}.index", shard.documents * 8),
        ):
            try:
                found = os.stat(os.path.join(self.folder, file)).st_size
            except FileNotFoundError:
                raise ValueError(f"shard {file} of {self.folder} is missing; run `shear-tron prepare` again") from None
            if found != expected:
                raise ValueError(
                    f"shard {file} of {self.folder} has {found} bytes, not {expected}: it is damaged; "
                    "run `shear-tron prepare` again"
                )

    def verify(self) -> None:
        """Read every token shard and compare its sha256. Raises ValueError for the first that differs."""
        for domain in self.domains.values():
            for shard in (*domain.train, *domain.held_out):
                if sha256(Path(self.folder) / shard.file) != shard.sha256:
                    raise ValueError(
                        f"shard {shard.file} of {self.folder} does not have its sha256: it is damaged; "
                        "delete it and run `shear-tron prepare` again"
                    )

    def domain(self, name: str) -> Domain:
        """The domain called ``name``. Raises ValueError when there is none, or it has no tokens to train on."""
        if name not in self.domains:
            near = difflib.get_close_matches(name, self.domains, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(self.domains)}"
            raise ValueError(f"domain {name!r} is not in {self.folder}; {hint}")
        if not self.domains[name].tokens():
            raise ValueError(f"domain {name!r} of {self.folder} is empty; leave it out or prepare more of it")
        return self.domains[name]

    def require(self, names: Sequence[str]) -> None:
        """Raise ValueError unless every domain is there and has tokens to train on."""
        for name in names:
            self.domain(name)
