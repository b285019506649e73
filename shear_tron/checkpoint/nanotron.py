"""nanotron checkpoints in and out: a file for each tensor and tensor-parallel rank; its header says which part it is.

A checkpoint of any layout loads into any other, so what is written here is of one pipeline stage.

There are two nanotrons (docs/nanotron.md): release 0.4 on PyPI turns neighbouring rows of a head and has one rotary
base; the main branch can turn halves, as Hugging Face does, and has a Qwen2 with biases. ``Flavour`` tells them apart.
Neither reading nor writing needs nanotron; ``check`` reads a checkpoint back with nanotron's own classes.
"""

import json
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.atomic import atomic
from shear_tron.checkpoint.nanotron_config import META, MODEL, Flavour, metas, model_config, read_model_config, require
from shear_tron.checkpoint.nanotron_pieces import FORMAT, TURNED, Piece, Whole, find_pieces, spell, turn, wholes
from shear_tron.checkpoint.safetensors_stream import open_file, storable
from shear_tron.params import Param, params


def write(
    folder: str | Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    flavour: Flavour = "main",
    dtype: torch.dtype | None = torch.bfloat16,
    tp: int = 1,
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that nanotron begins from (``model.init_method.path``), at step 0 and without an optimizer.

    tensors: (our name, tensor), each once, in any order; the parts of one packed tensor are in memory at a time.
    dtype: what to store; None is each tensor's own. tp: pieces of every cut tensor; nanotron reads any number into any
    layout. token_ids: ``bos_token_id`` and so on.
    Nothing appears at ``folder`` until all of it is written. Raises ValueError for what nanotron lacks (``require``),
    a missing, extra or misshaped tensor, and where ``folder`` already holds something.
    """
    require(architecture, flavour, tp)
    with atomic(folder) as partial:
        waiting = {part.name: (part, whole) for whole in wholes(architecture) for part in whole.parts}
        found: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if name not in waiting:
                raise ValueError(f"{name} is not a tensor of this model, or came twice; give every tensor once")
            part, whole = waiting.pop(name)
            if tuple(tensor.shape) != part.size:
                raise ValueError(f"{name} has size {list(tensor.shape)}; this model's is {list(part.size)}")
            tensor = storable(name, tensor, dtype or tensor.dtype)
            turned = flavour == "0.4" and part.row.leaf in TURNED
            found[name] = turn(tensor, architecture.shape.head_dim) if turned else tensor
            if all(part.name in found for part in whole.parts):
                _write_pieces(partial / whole.stem, whole, [found.pop(part.name) for part in whole.parts], tp)
        if waiting:
            raise ValueError(f"{next(iter(waiting))} was not given ({len(waiting)} missing in all)")
        config = model_config(architecture, flavour, token_ids or {})
        (partial / MODEL).write_text(json.dumps(config, indent=1) + "\n")
        (partial / META).write_text(json.dumps({"version": FORMAT, "tp": tp, "dp": 1, "metas": metas()}, indent=1))


def _write_pieces(stem: Path, whole: Whole, parts: list[Tensor], tp: int) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    if not whole.is_cut:
        save_file({"data": parts[0].contiguous()}, f"{stem}.safetensors")
        return
    for rank in range(tp):
        pairs, shares = [], []
        for tensor, (_, start, stop) in zip(parts, whole.spans(), strict=True):
            share = (stop - start) // tp
            here = whole.index(start // tp, start // tp + share) if len(parts) > 1 else whole.index(None, None)
            there = whole.index(start + rank * share, start + (rank + 1) * share)
            pairs.append(f"{spell(here)}#{spell(there)}")
            shares.append(tensor[whole.index(rank * share, (rank + 1) * share)])
        header = {
            "version": FORMAT,
            "local_global_slices_pairs": ";".join(pairs),
            "unsharded_shape": str(whole.size),
        }
        piece = torch.cat(shares, whole.axis).contiguous()
        save_file({"data": piece}, f"{stem}_pp-rank-0-of-1_tp-rank-{rank}-of-{tp}.safetensors", header)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint that nanotron saved, in whatever layout; read when asked for."""

    architecture: Architecture
    interleaved: bool
    _parts: Mapping[str, tuple[Whole, Param, int]]  # by our names: where it is, what it is, from where on
    _pieces: Mapping[Path, tuple[Piece, ...]]  # by a packed tensor's stem

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Check from ``model_config.json`` and every file's header that the checkpoint is whole.

        ValueError where pieces are missing or come twice, where there are files of another model's, and where the
        model has parts that are not read (``read_model_config``).
        """
        folder = Path(folder)
        architecture, interleaved = read_model_config(folder / MODEL)
        parts: dict[str, tuple[Whole, Param, int]] = {}
        pieces: dict[Path, tuple[Piece, ...]] = {}
        for whole in wholes(architecture):
            parts |= {part.name: (whole, part, start) for part, start, _ in whole.spans()}
            pieces[whole.stem] = find_pieces(folder, whole)
        known = {piece.file for every in pieces.values() for piece in every}
        if strange := sorted(set((folder / "model").rglob("*.safetensors")) - known):
            raise ValueError(f"{strange[0]} is no part of the model that {MODEL} describes; copy both again")
        ordered = {param.name: parts[param.name] for param in params(architecture)}
        return cls(architecture, interleaved, ordered, pieces)

    def names(self) -> list[str]:
        """Our names of all tensors, in the order of ``shear_tron.params.params``."""
        return list(self._parts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(our name, tensor), one in memory at a time."""
        return ((name, self.read(name)) for name in self._parts)

    def read(self, name: str) -> Tensor:
        """One whole tensor in its stored dtype, rows of heads in Hugging Face's order."""
        whole, part, start = self._parts[name]
        tensor = self._between(whole, start, start + part.size[whole.axis])
        turned = self.interleaved and part.row.leaf in TURNED
        return turn(tensor, self.architecture.shape.head_dim, back=True) if turned else tensor

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` along ``axis`` (0 or 1); of an axis that files cut, no others are read."""
        whole, part, first = self._parts[name]
        if axis == whole.axis and not (self.interleaved and part.row.leaf in TURNED):
            return self._between(whole, first + start, first + stop)
        return self.read(name).narrow(axis, start, stop - start).contiguous()

    def _between(self, whole: Whole, start: int, stop: int) -> Tensor:
        shares = []
        for piece in self._pieces[whole.stem]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                begin = piece.local + first - piece.start
                with open_file(piece.file) as opened:
                    shares.append(opened.get_slice("data")[whole.index(begin, begin + last - first)])
        return torch.cat(shares, whole.axis) if len(shares) > 1 else shares[0].contiguous()


def check(folder: str | Path) -> str:
    """Read a written checkpoint back with the classes of the nanotron that is installed; returns what was done.

    Its model wants flash_attn and a GPU. What is read is all that does not: progress, every file's header, and the
    sizes where they are spelled for the nanotron that is here. Raises ValueError where it refuses them. A nanotron
    that is missing or does not import is reported, not raised: nothing of ours needs it.
    """
    folder = Path(folder)
    try:
        nanotron = import_nanotron()
        from nanotron.parallel.parameters import SlicesPair
        from nanotron.serialize.metadata import TensorMetadata, load_meta
    except ImportError as error:
        return f"not read back: nanotron cannot be imported ({error})"
    try:
        load_meta(None, folder)
        config = json.loads((folder / MODEL).read_text())
        ours = set(config) <= {field.name for field in fields(nanotron.config.LlamaConfig)}
        if ours:
            nanotron.config.LlamaConfig(**config)
        files = sorted((folder / "model").rglob("*.safetensors"))
        for file in files:
            with open_file(file) as opened:
                header = opened.metadata()
            if header:  # norms have none
                found = TensorMetadata.from_str_dict(header)
                if SlicesPair.tuple_to_str(found.local_global_slices_pairs) != header["local_global_slices_pairs"]:
                    raise ValueError(f"{file} is read as {found}")
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"nanotron does not read {folder}: {error}") from None
    beside = "" if ours else f" ({MODEL} is for nanotron's main branch, which is not the one installed)"
    return f"{len(files)} files read back by nanotron's own classes{beside}"


def import_nanotron() -> Any:
    """The nanotron package. Release 0.4 needs help: its ``logging`` imports ``config``, which imports ``logging``.

    Raises ImportError where nanotron or something that it needs is missing.
    """
    try:
        import nanotron.config
    except ModuleNotFoundError:
        raise
    except ImportError:
        circle = ("nanotron.config", "nanotron.config.config")
        for name in circle:  # logging takes one name from there, for an annotation
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].LoggingArgs = object  # type: ignore[attr-defined]
        try:
            import nanotron.logging
        finally:
            for name in circle:
                del sys.modules[name]
        import nanotron.config
    return nanotron
