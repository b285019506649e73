"""Token shards of the paper's released code (MDS, mosaicml-streaming's format) as prepared data.

A folder of a domain holds ``index.json`` and the shards that it names. A shard, in little-endian uint32: the number n
of samples, n + 1 places in the file where samples begin and the last one ends, a copy of the description, the samples.
A sample: the sizes of those columns that have no fixed one, then the columns' bytes, both in the order of
``column_names``. Only ``tokens`` is read; what other columns hold (it may be a pickle) is passed over undecoded.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, model_validator

from shear_tron.data.manifest import FILE, Domain, Manifest, Shard
from shear_tron.data.tokenizer import Tokenizer, load
from shear_tron.files import sha256
from shear_tron.progress import bar
from shear_tron.reading import in_one_line, is_file_name, read_json, short

INDEX, COLUMN = "index.json", "tokens"
Count = Annotated[int, Field(ge=0, lt=2**32)]
Ids = npt.NDArray[np.unsignedinteger]


def is_mds(folder: str) -> bool:
    """Whether ``folder`` holds MDS folders, one for each domain."""
    return Path(folder).is_dir() and any(Path(folder).glob(f"*/{INDEX}"))


def import_data(train: str, held_out: str, output: str, tokenizer: str) -> Manifest:
    """Make prepared data of ``train/DOMAIN`` and ``held_out/DOMAIN``, sample by sample and in their order.

    Documents end where the tokenizer's eos stands, and where a sample ends: those were cut to one length. ValueError
    for folders that are not whole, compressed shards, ids that the tokenizer has not, and an output that is there.
    """
    target, words = Path(output), load(tokenizer)
    if (target / FILE).exists():
        raise ValueError(f"{output} holds prepared data; choose another folder or remove it")
    if words.eos is None:
        raise ValueError(f"tokenizer={tokenizer} names no eos token, which ends documents; give the model's own")
    domains = {}
    for name in sorted(path.parent.name for path in Path(train).glob(f"*/{INDEX}")):
        if not (Path(held_out) / name / INDEX).exists():
            raise ValueError(f"{held_out} has no {name}/{INDEX}; give the folder of the domains' held-out samples")
        domains[name] = Domain(
            train=tuple(_shards(Path(train) / name, target, f"{name}/train", words)),
            held_out=tuple(_shards(Path(held_out) / name, target, f"{name}/held_out", words)),
            source=str(Path(train) / name),
        )
    aside = sum(domain.tokens("held_out") for domain in domains.values())
    tokens = aside + sum(domain.tokens() for domain in domains.values())
    if not tokens:
        raise ValueError(f"{train} holds no tokens; copy it again")
    manifest = Manifest(
        folder=output,
        tokenizer=tokenizer,
        tokenizer_sha256=words.sha256,
        vocab=words.vocab,
        token_bytes=2 if words.vocab <= 2**16 else 4,
        bos=None if words.bos is None else words.id(words.bos),
        separator=words.id(words.eos),
        held_out_share=aside / tokens,
        domains=domains,
    )
    manifest.write()
    return manifest


def _shards(source: Path, target: Path, place: str, words: Tokenizer) -> Iterator[Shard]:
    """Each shard of ``source`` as one of ours."""
    end = words.id(str(words.eos))
    (target / place).mkdir(parents=True, exist_ok=True)
    described = _described(source)
    for number, shard in enumerate(bar(place, len(described), "shards", iterable=described)):
        name, tokens, ends = f"{place}/{number:05d}.ds", 0, [np.empty(0, np.uint64)]
        with open(target / name, "wb") as file:
            for ids in samples(source, shard):
                if not len(ids) or ids.max() >= words.vocab:
                    raise ValueError(f"{source} holds ids that {words.path} has not; give the model's own tokenizer")
                file.write(ids.astype("<u2" if words.vocab <= 2**16 else "<u4").tobytes())
                inside = np.flatnonzero(ids[:-1] == end) + 1
                ends.append(np.append(inside, len(ids)).astype(np.uint64) + np.uint64(tokens))
                tokens += len(ids)
        index = np.concatenate(ends).astype("<u8")
        index.tofile(target / f"{name}.index")
        if tokens:
            yield Shard(name, tokens, len(index), sha256(target / name), sha256(target / f"{name}.index"))


class _File(BaseModel):
    basename: str


class _Mds(BaseModel):
    """A shard, as ``index.json`` describes it."""

    format: str
    version: int
    compression: str | None
    samples: Count
    column_names: list[str]
    column_sizes: list[Count | None]
    column_encodings: list[str]
    raw_data: _File

    @model_validator(mode="after")
    def _is_readable(self) -> Self:
        if COLUMN not in self.column_names:
            raise ValueError(f"has no column {COLUMN!r}")
        if not len(self.column_names) == len(self.column_sizes) == len(self.column_encodings):
            raise ValueError("has columns without a size or an encoding")
        if self.format != "mds" or self.version != 2 or self.column_encodings[self.column] != "bytes":
            raise ValueError("use MDS, version 2, with tokens as bytes")
        if self.compression:
            raise ValueError(f"compression={short(self.compression)}; write the shards again without")
        if not is_file_name(self.raw_data.basename):
            raise ValueError(f"points at {short(self.raw_data.basename)}, no file of its folder; list names only")
        return self

    @property
    def column(self) -> int:
        """Which one is read."""
        return self.column_names.index(COLUMN)


class _Index(BaseModel):
    shards: list[_Mds] = Field(min_length=1)


def _described(folder: Path) -> list[_Mds]:
    try:
        return _Index.model_validate(read_json(folder / INDEX), strict=True).shards
    except ValueError as error:
        raise ValueError(f"{folder / INDEX} describes no MDS ({in_one_line(error)}); copy it again") from None


def samples(folder: Path, shard: _Mds) -> Iterator[Ids]:
    """Token ids of each sample of a shard."""
    file, sizes, column, count = shard.raw_data.basename, shard.column_sizes, shard.column, shard.samples
    if not (folder / file).is_file() or not (folder / file).stat().st_size:
        raise ValueError(f"{folder / file} is not there, or empty; copy it again")
    content = np.memmap(folder / file, np.uint8, "r")
    head = content[: 4 * (count + 2)]
    places = np.frombuffer(head[: len(head) // 4 * 4], "<u4")[1:].astype(np.int64)
    if len(places) != count + 1 or places[-1] != len(content) or (np.diff(places) < 0).any():
        raise ValueError(f"{folder / file} does not hold {count} samples; copy it again")
    for start, stop in pairwise(places):
        yield _tokens(content[start:stop].tobytes(), sizes, column, folder / file)


def _tokens(sample: bytes, fixed: list[int | None], column: int, file: Path) -> Ids:
    heads = sum(size is None for size in fixed)
    variable = iter(np.frombuffer(sample[: min(4 * heads, len(sample) // 4 * 4)], "<u4").tolist())
    sizes = [next(variable, 0) if size is None else size for size in fixed]
    begin = 4 * heads + sum(sizes[:column])
    found = sample[begin : begin + sizes[column]]
    if 4 * heads + sum(sizes) != len(sample) or len(found) % 2:
        raise ValueError(f"{file} holds a sample that is not as long as it says; copy it again")
    narrow = np.frombuffer(found, "<u2")
    if len(found) % 8 == 0 and len(found) and not narrow.reshape(-1, 4)[:, 1:].any():
        return np.frombuffer(found, "<u8")  # written as int64, which the released code reads with is_uint16: false
    return narrow
