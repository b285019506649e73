"""``domains.json``: what a prepared folder holds, and whether it is whole."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter

from shear_tron.data.tokenizer import fingerprint
from shear_tron.files import sha256, write_atomically
from shear_tron.reading import in_one_line, is_file_name, read_json, short

FILE = "domains.json"
FORMAT = 1


def _inside(file: str) -> str:
    """A path that stays in the folder it counts from."""
    path = PurePosixPath(file)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in file:
        raise ValueError("is no path inside the folder")
    return file


def _folder(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("is no name of a folder")
    return name


DomainName = Annotated[str, AfterValidator(_folder)]
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Shard:
    """One ``.ds`` file (datatrove's format: raw little-endian ids) and its ``.ds.index`` (uint64 document ends)."""

    __pydantic_config__ = _STRICT

    file: Annotated[str, AfterValidator(_inside)]  # relative to the folder
    tokens: Annotated[int, Field(ge=1)]
    documents: Annotated[int, Field(ge=1)]
    sha256: str
    index_sha256: str | None = None  # None: written before there was one


@dataclass(frozen=True)
class Domain:
    """A domain's shards in reading order. ``held_out`` is never trained on."""

    __pydantic_config__ = _STRICT

    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]
    source: str = ""
    licence: str = ""
    empty: Count = 0  # documents without text, left out
    damaged: Count = 0  # records that could not be read, left out
    duplicates: Count | None = None  # documents left out because the same text came before; None: nobody looked

    def tokens(self, split: Literal["train", "held_out"] = "train") -> int:
        return sum(shard.tokens for shard in getattr(self, split))

    def documents(self, split: Literal["train", "held_out"] = "train") -> int:
        return sum(shard.documents for shard in getattr(self, split))


def require_size(folder: str, shard: Shard, token_bytes: int) -> None:
    """ValueError where a shard, or its index, is not there or not as long as it says."""
    for file, expected in ((shard.file, shard.tokens * token_bytes), (f"{shard.file}.index", shard.documents * 8)):
        place = Path(folder) / file
        try:
            found = place.stat().st_size if place.is_file() or not place.exists() else "no"
        except (OSError, ValueError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({in_one_line(error)})"
            raise ValueError(f"shard {short(file)} of {folder} {reason}; run `shear-tron prepare` again") from None
        if found != expected:
            raise ValueError(
                f"shard {file} of {folder} has {found} bytes, not {expected}: it is damaged; "
                "run `shear-tron prepare` again"
            )


@dataclass(frozen=True)
class Manifest:
    """A prepared folder.

    ``vocab`` is the tokenizer's largest id plus one, ``token_bytes`` 2 or 4, ``bos`` and ``separator`` the ids that
    open and close every document (None: not added).
    """

    __pydantic_config__ = _STRICT

    folder: str
    tokenizer: str
    tokenizer_sha256: str
    vocab: Annotated[int, Field(ge=1)]
    token_bytes: Annotated[int, Field(ge=2, le=4, multiple_of=2)]
    bos: Count | None
    separator: Count | None
    held_out_share: float
    domains: dict[DomainName, Domain]

    @classmethod
    def read(
        cls, folder: str, tokenizer: str | None = None, vocab: int | None = None, shards: bool = True
    ) -> "Manifest":
        """Read ``folder/domains.json`` and check the size of every shard (no shard is opened).

        ``tokenizer`` is the model's tokenizer (file or folder) and ``vocab`` the rows of its embedding: ValueError
        when the data was not made for them. A model may have more rows than ids, as padded embeddings do, by a
        sixteenth at most. ``shards``: False for who needs what is said of them, and not them. ValueError too for a
        folder that was never prepared, or a missing or truncated shard.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise ValueError(f"data folder {folder} holds no {FILE}; make it with `shear-tron prepare`")
        try:
            content = read_json(file)
            found = content.pop("format", None)
            if found != FORMAT:
                raise ValueError(f"{file} has format={short(found)}, not {FORMAT}")
            # strict, as JSON: no number is made of a text
            manifest = TypeAdapter(cls).validate_json(json.dumps({**content, "folder": folder}), strict=True)
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({in_one_line(error)}); run `shear-tron prepare` again") from None
        manifest._check_model(tokenizer, vocab)
        for shard in manifest.shards() if shards else ():
            require_size(folder, shard, manifest.token_bytes)
        return manifest

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

    def shards(self) -> list[Shard]:
        """Every shard of every domain."""
        return [shard for domain in self.domains.values() for shard in (*domain.train, *domain.held_out)]

    def verify(self) -> None:
        """Read everything. Raises ValueError for the first shard that is not what was written."""
        for shard in self.shards():
            self.verify_shard(shard)

    def verify_shard(self, shard: Shard) -> None:
        """Read a shard and its index. Raises ValueError where it is not what was written."""
        if sha256(Path(self.folder) / shard.file) != shard.sha256:
            raise ValueError(
                f"shard {shard.file} of {self.folder} does not have its sha256: it is damaged; "
                "delete it and run `shear-tron prepare` again"
            )
        index = Path(self.folder) / f"{shard.file}.index"
        ends = np.fromfile(index, dtype="<u8").astype(np.int64)
        whole = ends[-1] == shard.tokens and bool((np.diff(ends, prepend=0) > 0).all())
        if not whole or (shard.index_sha256 and sha256(index) != shard.index_sha256):
            raise ValueError(f"{index} is damaged; delete it and its shard, and run `shear-tron prepare` again")

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
