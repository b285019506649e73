"""Folders of safetensors files: finding and reading the tensors of one, and writing one tensor by tensor.

Reading is the safetensors library's, which maps files into memory and reads what is asked for. Writing is ours because
the library wants all tensors of a file at once. The format is simple (https://huggingface.co/docs/safetensors): eight
bytes of header length, little-endian; a JSON header with each tensor's dtype, shape and place; the tensors.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shear_tron import reading
from shear_tron.reading import in_one_line, is_file_name, short

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_CODES = {dtype: code for code, dtype in {**DTYPES, **_INTEGERS, "BOOL": torch.bool}.items()}

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what its file's header says of it."""

    path: Path
    name: str
    dtype: str
    size: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file where it holds none."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder saved by transformers' save_pretrained")
    try:
        return reading.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; fetch it again") from None


def open_file(path: Path) -> Any:
    """The library's handle on one file, its header checked against the file's length; ValueError naming the file."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is no regular file; fetch it again")
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; fetch the whole folder again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupt or cut short ({in_one_line(error)}); fetch it again") from None


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder, from the headers of ``model.safetensors`` or of the files its index names."""
    if (folder / SINGLE).exists():
        return _header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {INDEX}; pickled weights are never loaded, "
            "save the model with transformers' save_pretrained first"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map; fetch it again")
    found: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        if not is_file_name(file):
            raise ValueError(f"{folder / INDEX} points at {short(file)}, no file of its folder; list names only")
        for name, entry in _header(folder / file).items():
            if weight_map.get(name) != file:
                raise ValueError(f"{folder / file} holds {name}, which {INDEX} does not place there; fetch both again")
            found[name] = entry
    lost = sorted(set(weight_map) - set(found))
    if lost:
        raise ValueError(
            f"{folder / weight_map[lost[0]]} lacks {lost[0]}, which {INDEX} places there; fetch both again"
        )
    return found


def _header(path: Path) -> dict[str, Entry]:
    with open_file(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: Entry(path, name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """What comes before the tensors of a file, which follow one another in this order; and the byte of each's begin."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begins, end = {}, 0
    for name, (dtype, size) in tensors.items():
        begins[name], end = end, end + prod(size) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(size), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins.items()}


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. By one pass; `tensor.isfinite()` makes several tensors of this size."""
    return not tensor.numel() or bool(_extremes(tensor).isfinite().all())


def _extremes(tensor: Tensor) -> Tensor:
    """Least and greatest value; NaN where there is one."""
    return torch.stack(tensor.detach().aminmax())


def storable(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor on the CPU in ``dtype``; ValueError where a value is not finite, or not any more."""
    extremes = _extremes(tensor)
    if not bool(extremes.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinite values, and nothing like that is written")
    if not bool(extremes.to(dtype).isfinite().all()):  # rounding keeps the order
        raise ValueError(f"{name} holds values beyond the range of {dtype}; store a wider type")
    return tensor.detach().to(device="cpu", dtype=dtype)


class Writer:
    """Writes tensors whose sizes are known beforehand, in any order, holding none of them.

    The tensors are placed in files of at most ``shard_bytes`` (a larger tensor gets its own) in the order of ``sizes``;
    several files get an index. The folder must exist. ``close`` makes the files durable.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: float):
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype={dtype} is not a weight's type; use float32, bfloat16, float16 or float64")
        self._sizes, self._dtype, self._written = sizes, dtype, set[str]()
        shards: list[dict[str, int]] = [{}]  # name -> bytes
        for name, size in sizes.items():
            length = prod(size) * dtype.itemsize
            if shards[-1] and sum(shards[-1].values()) + length > shard_bytes:
                shards.append({})
            shards[-1][name] = length
        self._places: dict[str, tuple[Path, int]] = {}  # name -> file, byte
        for number, shard in enumerate(shards, 1):
            single = len(shards) == 1
            path = folder / (SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            self._begin(path, shard)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
                "weight_map": {name: path.name for name, (path, _) in self._places.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _begin(self, path: Path, lengths: Mapping[str, int]) -> None:
        """Write the header of a file and make the file as long as it will be."""
        text, begins = header({name: (self._dtype, self._sizes[name]) for name in lengths}, {"format": "pt"})
        self._places |= {name: (path, begin) for name, begin in begins.items()}
        with path.open("xb") as file:
            file.write(text)
            file.truncate(len(text) + sum(lengths.values()))

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place, in this writer's dtype."""
        if name not in self._places:
            raise ValueError(f"{name} is not a tensor of this model; leave it out")
        if name in self._written:
            raise ValueError(f"{name} came twice; give every tensor once")
        if tuple(tensor.shape) != self._sizes[name]:
            raise ValueError(f"{name} has size {list(tensor.shape)}; this model's is {list(self._sizes[name])}")
        path, offset = self._places[name]
        flat = storable(name, tensor, self._dtype).contiguous().flatten()
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(flat.view(torch.uint8).numpy().data)
        self._written.add(name)

    def close(self) -> None:
        """Check that every tensor came, and wait until the disk has them."""
        missing = [name for name in self._sizes if name not in self._written]
        if missing:
            raise ValueError(f"{missing[0]} was not given ({len(missing)} missing in all); give every tensor once")
        for path in sorted({path for path, _ in self._places.values()}):
            with path.open("r+b") as file:
                os.fsync(file.fileno())
