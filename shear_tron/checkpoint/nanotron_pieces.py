"""How nanotron lays a LLaMA out in files: several of our tensors in one of its own, cut over ranks; one file a piece.

It puts q, k and v below each other, and gate and up, and cuts each of these parts by itself over tensor-parallel ranks.
A file's header says which part of the whole tensor it holds: pairs of (slices of the file, slices of the whole).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.names import Names, Packed, stored, with_biases
from shear_tron.checkpoint.safetensors_stream import DTYPES, open_file
from shear_tron.params import Param
from shear_tron.reading import short

FORMAT = "1.2"  # of the checkpoint: release 0.4 writes it; main writes 1.5 and reads both
READ = ("1.2", "1.3", "1.4", "1.5")

_QKV = Packed("model.decoder.{}.pp_block.attn.qkv_proj.weight", ("q", "k", "v"), "part")
_GATE_UP = Packed("model.decoder.{}.pp_block.mlp.gate_up_proj.weight", ("gate", "up"), "part")
NAMES: Names = with_biases(
    {
        "embed": "model.token_position_embeddings.pp_block.token_embedding.weight",
        "attn_norm": "model.decoder.{}.pp_block.input_layernorm.weight",
        **dict.fromkeys("qkv", _QKV),
        "o": "model.decoder.{}.pp_block.attn.o_proj.weight",
        "mlp_norm": "model.decoder.{}.pp_block.post_attention_layernorm.weight",
        **dict.fromkeys(("gate", "up"), _GATE_UP),
        "down": "model.decoder.{}.pp_block.mlp.down_proj.weight",
        "norm": "model.final_layer_norm.pp_block.weight",
        "lm_head": "model.lm_head.pp_block.weight",  # not there with tied embeddings
    }
)
TURNED = ("q", "k", "q_bias", "k_bias")  # what rotary embeddings act on


@dataclass(frozen=True)
class Whole:
    """One tensor of nanotron's: how its files in a checkpoint begin, and the parameters of ours that lie in it."""

    stem: Path
    parts: tuple[Param, ...]

    @property
    def axis(self) -> int:
        """Along which the parts lie and ranks cut. 0 where nothing is cut."""
        return self.parts[0].row.cut_axis or 0

    @property
    def is_cut(self) -> bool:
        return self.parts[0].row.cut_axis is not None

    @property
    def size(self) -> tuple[int, ...]:
        size = list(self.parts[0].size)
        size[self.axis] = sum(part.size[self.axis] for part in self.parts)
        return tuple(size)

    def spans(self) -> list[tuple[Param, int, int]]:
        """(part, start, stop) along the axis."""
        found, start = [], 0
        for part in self.parts:
            found.append((part, start, start + part.size[self.axis]))
            start += part.size[self.axis]
        return found

    def index(self, start: int | None, stop: int | None) -> tuple[slice, ...]:
        """``start`` to ``stop`` along the axis, all of the others."""
        return tuple(slice(start, stop) if axis == self.axis else slice(None) for axis in range(len(self.size)))


def wholes(architecture: Architecture) -> list[Whole]:
    """Every tensor of a checkpoint, in the order of ours."""
    found = []
    for each in stored(architecture, NAMES):
        *modules, leaf = each.name.split(".")
        found.append(Whole(Path("model", *modules, f"model_{leaf}"), each.params))
    return found


def turn(weight: Tensor, head_dim: int, back: bool = False) -> Tensor:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, ..: rotary halves become neighbours; or ``back``."""
    pairs = (head_dim // 2, 2) if back else (2, head_dim // 2)
    return weight.view(-1, *pairs, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class Piece:
    """Entries ``start`` to ``stop`` of a packed tensor along its axis: in ``file`` they begin at ``local``."""

    file: Path
    local: int
    start: int
    stop: int


def find_pieces(checkpoint: Path, whole: Whole) -> tuple[Piece, ...]:
    """The pieces of a packed tensor, in order and without a gap."""
    stem, found = checkpoint / whole.stem, list[Piece]()
    for file in sorted(stem.parent.glob(f"{stem.name}*.safetensors")):
        with open_file(file) as opened:
            if list(opened.keys()) != ["data"]:
                raise ValueError(f"{file} holds no piece of nanotron's; copy it again")
            header, data = opened.metadata() or {}, opened.get_slice("data")
            held, dtype = tuple(data.get_shape()), data.get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{file} is {dtype}; use weights in {', '.join(DTYPES)}")
        if header.get("version", FORMAT) not in READ:
            raise ValueError(f"{file} is of format {header['version']}; use a checkpoint of {READ[0]} to {READ[-1]}")
        size = held
        if "unsharded_shape" in header:  # numpy 2 made release 0.4 write (np.int64(96), 32)
            size = tuple(map(int, re.findall(r"\d+(?=[),]|$)", header["unsharded_shape"])))
        if size != whole.size:
            raise ValueError(
                f"{file} is of a tensor of size {list(size)}, model_config.json asks for {list(whole.size)}"
            )
        every = spell(whole.index(None, None))
        for pair in header.get("local_global_slices_pairs", f"{every}#{every}").split(";"):
            local, _, there = pair.partition("#")
            begin, end = _along(file, local, whole, held)
            start, stop = _along(file, there, whole, whole.size)
            if end - begin != stop - start:
                raise ValueError(f"{file} is cut in a way that no LLaMA is ({short(pair)}); import another checkpoint")
            found.append(Piece(file, begin, start, stop))
    found.sort(key=lambda piece: piece.start)
    ends = [0, *(piece.stop for piece in found)]
    starts = [*(piece.start for piece in found), whole.size[whole.axis]]
    if ends != starts:
        raise ValueError(f"{stem}* is not one tensor in pieces; copy all ranks' files, and those of one layout only")
    return tuple(found)


def _along(file: Path, spelt: str, whole: Whole, size: tuple[int, ...]) -> tuple[int, int]:
    """Start and stop along the axis, from slices in nanotron's spelling of a tensor of ``size``; others are whole."""
    try:
        bounds = [[None if n == "None" else int(n) for n in axis.split(",")] for axis in spelt.split("|")]
        spans = [
            (start or 0, length if stop is None else stop, step or 1)
            for (start, stop, step), length in zip(bounds, size, strict=True)
        ]
    except ValueError:
        spans = []
    uncut = [(0, length, 1) for length in whole.size]
    begin, end, step = spans.pop(whole.axis) if len(spans) == len(uncut) else (0, 0, 1)
    if not 0 <= begin < end <= size[whole.axis] or step != 1 or spans != uncut[: whole.axis] + uncut[whole.axis + 1 :]:
        raise ValueError(f"{file} is cut in a way that no LLaMA is ({short(spelt)}); import another checkpoint")
    return begin, end


def spell(part: tuple[slice, ...]) -> str:
    return "|".join(f"{axis.start},{axis.stop},{axis.step}" for axis in part)
