"""Hugging Face folders in and out: config.json, safetensors, tokenizer. Strict both ways, one tensor at a time.

Names are a family's (``families``); fused tensors are taken apart and put together (``names``), nothing is permuted.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.atomic import atomic
from shear_tron.checkpoint.huggingface_config import TOKEN_IDS, architecture_config, family_of, read_architecture
from shear_tron.checkpoint.names import Read, Stored, stored
from shear_tron.checkpoint.safetensors_stream import DTYPES, Entry, Writer, entries, open_file, read_json
from shear_tron.params import Param, params

__all__ = ["Weights", "architecture_config", "read_architecture", "write"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of these


@dataclass(frozen=True)
class Weights:
    """The weights of a Hugging Face folder, read when asked for."""

    architecture: Architecture
    _places: Mapping[str, tuple[Entry, Stored, Param]]  # by our names

    @classmethod
    def open(cls, folder: str | Path, architecture: Architecture) -> "Weights":
        """Check from the files' headers that they hold exactly the tensors of ``architecture``.

        Raises ValueError for a missing, extra, misshaped or quantised tensor and for a damaged file, naming it. Two
        extras are harmless and let pass: buffers (rotary frequencies and masks, computed anyway), and beside tied
        embeddings a head, provided that its values (read for this) are the embedding's.
        """
        folder = Path(folder)
        found, family = entries(folder), family_of(architecture)
        tensors = {tensor.name: tensor for tensor in stored(architecture, family.names)}
        embed, head = str(family.names["embed"]), str(family.names["lm_head"])
        for name in found:
            redundant = name.endswith(family.buffers) or (name == head and architecture.shape.tied)
            if name not in tensors and not redundant:
                raise ValueError(f"{found[name].path} holds {name}, which this model lacks; check config.json")
        for tensor in tensors.values():
            _check(folder, tensor, found)
        if architecture.shape.tied and head in found:
            _check_tied_head(found[embed], found[head])
        places = {
            param.name: (found[tensor.name], tensor, param) for tensor in tensors.values() for param in tensor.params
        }
        return cls(architecture, {param.name: places[param.name] for param in params(architecture)})

    def names(self) -> list[str]:
        """Our names of all tensors, in the order of ``shear_tron.params.params``."""
        return list(self._places)

    def read(self, name: str) -> Tensor:
        """One whole tensor in its stored dtype, mapped from its file: pages are read as they are used."""
        entry, tensor, param = self._places[name]
        if len(tensor.params) == 1:
            whole: Tensor = open_file(entry.path).get_tensor(entry.name)
            return whole
        return tensor.read(_reader(entry), param)

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` along ``axis`` of one tensor; only they are kept in memory."""
        entry, tensor, param = self._places[name]
        size = param.size
        if not 0 <= axis < len(size):
            raise ValueError(f"axis={axis} is not an axis of {name} {list(size)}; use 0 to {len(size) - 1}")
        if not 0 <= start <= stop <= size[axis]:
            raise ValueError(f"{start}:{stop} is not within axis {axis} of {name} {list(size)}; use 0:{size[axis]}")
        part = tensor.read_slice(_reader(entry), param, axis, start, stop)
        return part.contiguous() if len(tensor.params) == 1 else part.clone()  # not a view of its neighbours


def _reader(entry: Entry) -> Read:
    part = open_file(entry.path).get_slice(entry.name)

    def read(axis: int, start: int, stop: int) -> Tensor:
        found: Tensor = part[(*(slice(None) for _ in range(axis)), slice(start, stop))]
        return found

    return read


def _check(folder: Path, tensor: Stored, found: Mapping[str, Entry]) -> None:
    entry = found.get(tensor.name)
    if entry is None:
        raise ValueError(f"{folder} lacks {tensor.name}, which config.json asks for; fetch the whole folder again")
    if entry.size != tensor.size:
        raise ValueError(
            f"{entry.path}: {tensor.name} has size {list(entry.size)}, config.json asks for {list(tensor.size)}; "
            "use weights and config.json of one model"
        )
    if entry.dtype not in DTYPES:
        raise ValueError(f"{entry.path}: {tensor.name} is {entry.dtype}; use weights in {', '.join(DTYPES)}")


def _check_tied_head(embed: Entry, head: Entry, rows: int = 8192) -> None:
    same = embed.size == head.size
    if same:
        one, two = _reader(embed), _reader(head)
        spans = ((start, min(start + rows, embed.size[0])) for start in range(0, embed.size[0], rows))
        same = all(torch.equal(one(0, *span), two(0, *span)) for span in spans)
    if not same:
        raise ValueError(
            f"{head.path}: {head.name} differs from the embedding though config.json ties them; "
            f"set tie_word_embeddings to false or remove {head.name}"
        )


def write(
    folder: str | Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    tokenizer_from: str | Path | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` open.

    tensors: (our name, tensor), each once, in any order and on any device; one at a time is in memory. dtype: what to
    store; None is the first tensor's, and another's must be the same. tokenizer_from: a folder whose tokenizer files
    and special token ids are taken over. Nothing appears at ``folder`` until all of it is written. Raises ValueError
    for a missing, extra or misshaped tensor, for sizes that transformers refuses (``architecture_config``), and where
    ``folder`` already holds something.
    """
    source = None if tokenizer_from is None else Path(tokenizer_from)
    if source is not None and not any((source / file).exists() for file in _VOCABULARIES):
        raise ValueError(f"{source} has no tokenizer ({', '.join(_VOCABULARIES)}); give the folder of the source model")
    architecture_config(architecture, torch.float32)  # raises now, not after the last tensor
    with atomic(folder) as partial:
        partial.mkdir()
        stored = _write_tensors(partial, architecture, tensors, dtype, shard_bytes)
        config = architecture_config(architecture, stored)
        if source is not None:
            _copy_tokenizer(source, partial, config)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _write_tensors(
    folder: Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    shard_bytes: float,
) -> torch.dtype:
    """Write all tensors; returns the dtype they have on disk. Of a fused tensor the parts wait for each other."""
    tensors_stored = list(stored(architecture, family_of(architecture).names))
    places = {param.name: (param, tensor) for tensor in tensors_stored for param in tensor.params}
    waiting: dict[str, Tensor] = {}
    writer: Writer | None = None
    kept = dtype
    for name, tensor in tensors:
        if writer is None or kept is None:
            kept = tensor.dtype if dtype is None else dtype
            writer = Writer(folder, {each.name: each.size for each in tensors_stored}, kept, shard_bytes)
        if dtype is None and tensor.dtype != kept:
            raise ValueError(f"{name} is {tensor.dtype}, tensors before it {kept}; name the dtype to store")
        if name not in places:
            raise ValueError(f"{name} is not a tensor of this model; leave it out")
        param, whole = places[name]
        if name in waiting:
            raise ValueError(f"{name} came twice; give every tensor once")
        if tuple(tensor.shape) != param.size:
            raise ValueError(f"{name} has size {list(tensor.shape)}; this model's is {list(param.size)}")
        waiting[name] = tensor
        if all(param.name in waiting for param in whole.params):
            writer.write(whole.name, whole.pack([waiting.pop(param.name) for param in whole.params]))
    if writer is None or kept is None:
        raise ValueError("no tensors were given; give every tensor of the model once")
    for name in waiting:
        lacking = next(param.name for param in places[name][1].params if param.name not in waiting)
        raise ValueError(f"{lacking} was not given beside {name}; give every tensor once")
    writer.close()
    return kept


def _copy_tokenizer(source: Path, folder: Path, config: dict[str, Any]) -> None:
    for file in TOKENIZER_FILES:
        if (source / file).exists():
            shutil.copyfile(source / file, folder / file)
    if (source / "config.json").exists():
        theirs = read_json(source / "config.json")
        config.update({key: theirs[key] for key in TOKEN_IDS if key in theirs})
