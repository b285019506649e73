"""Token shards of the paper's released code (MDS, mosaicml-streaming's format) as prepared data.

A folder of a domain holds ``index.json`` and the shards that it names. A shard, in little-endian uint32: the number n
of samples, n + 1 places in the file where samples begin and the last one ends, a copy of the description, the samples.
A sample: the sizes of those columns that have no fixed one, then the columns' bytes, both in the order of
``column_names``. Only ``tokens`` is read; what other columns hold (it may be a pickle) is passed over undecoded.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from shear_tron.data.manifest import FILE, Domain, Manifest, Shard
from shear_tron.data.tokenizer import Tokenizer, load
from shear_tron.files import sha256
from shear_tron.reading import read_json, short

INDEX, COLUMN = "index.json", "tokens"
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
    described = read_json(source / INDEX).get("shards")
    if not isinstance(described, list) or not described:
        raise ValueError(f"{source / INDEX} lists no shards; copy the folder again")
    for number, shard in enumerate(tqdm(described, desc=place, unit=" shards", disable=None)):
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


def samples(folder: Path, shard: dict[str, Any]) -> Iterator[Ids]:
    """Token ids of each sample of a shard. shard: its entry in ``index.json``."""
    try:
        names, sizes, encodings = (shard[f"column_{key}"] for key in ("names", "sizes", "encodings"))
        file, count, compression = shard["raw_data"]["basename"], shard["samples"], shard["compression"]
        column = names.index(COLUMN)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{folder / INDEX} describes no MDS shard with a column {COLUMN!r}; copy it again") from None
    if shard.get("format") != "mds" or shard.get("version") != 2 or encodings[column] != "bytes":
        raise ValueError(f"{folder / INDEX} describes {short(shard)}; use MDS, version 2, with tokens as bytes")
    if compression:
        raise ValueError(f"{folder}: compression={compression}; write the shards again without")
    if Path(file).name != file:
        raise ValueError(f"{folder / INDEX} points at {short(file)} outside its folder; list file names only")
    content = np.memmap(folder / file, np.uint8, "r")
    places = np.frombuffer(content[: 4 * (count + 2)], "<u4")[1:].astype(np.int64)
    if len(places) != count + 1 or places[-1] != len(content) or (np.diff(places) < 0).any():
        raise ValueError(f"{folder / file} does not hold {count} samples; copy it again")
    for start, stop in pairwise(places):
        yield _tokens(content[start:stop].tobytes(), sizes, column, folder / file)


def _tokens(sample: bytes, fixed: list[int | None], column: int, file: Path) -> Ids:
    heads = sum(size is None for size in fixed)
    variable = iter(np.frombuffer(sample[: 4 * heads], "<u4").tolist())
    sizes = [next(variable, 0) if size is None else size for size in fixed]
    begin = 4 * heads + sum(sizes[:column])
    found = sample[begin : begin + sizes[column]]
    if 4 * heads + sum(sizes) != len(sample) or len(found) % 2:
        raise ValueError(f"{file} holds a sample that is not as long as it says; copy it again")
    narrow = np.frombuffer(found, "<u2")
    if len(found) % 8 == 0 and len(found) and not narrow.reshape(-1, 4)[:, 1:].any():
        return np.frombuffer(found, "<u8")  # written as int64, which the released code reads with is_uint16: false
    return narrow
