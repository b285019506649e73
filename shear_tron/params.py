"""The table of named dimensions: one row per kind of parameter. Most of the project follows from it.

A row says what the parameter is called here and in Hugging Face, which dimensions it spans, and which masks its values
are scaled by when a mask is folded into the weights. From it come: parameter counts, names in checkpoints, what tensor
parallelism cuts, which rows and columns a mask selects, and where its values go.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from shear_tron.shape import Shape


class Dim(Enum):
    """A dimension of a weight, or (LAYERS) of the stack of layers."""

    VOCAB = "vocab"
    HIDDEN = "hidden"
    HEADS = "heads"  # heads * head_dim rows: the query heads, group after group
    KV_HEADS = "kv_heads"  # kv_heads * head_dim rows
    FFN = "ffn"
    LAYERS = "layers"

    def size(self, shape: Shape) -> int:
        """Length of an axis of this dimension in a weight of a model of ``shape``."""
        unit = shape.head_dim if self in (Dim.HEADS, Dim.KV_HEADS) else 1
        return int(getattr(shape, self.value)) * unit


# What tensor parallelism cuts. HIDDEN is whole on every rank.
CUT = frozenset({Dim.VOCAB, Dim.HEADS, Dim.KV_HEADS, Dim.FFN})


@dataclass(frozen=True)
class Row:
    """One kind of parameter. ``{}`` in the names stands for the layer's number."""

    name: str
    hf: str
    dims: tuple[Dim, ...]
    scaled_by: frozenset[Dim] = frozenset()

    @property
    def in_layer(self) -> bool:
        return self.name.startswith("layers.")

    @property
    def leaf(self) -> str:
        """Name within its module: ``q`` for ``layers.3.q``."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def cut_axis(self) -> int | None:
        """The axis that tensor parallelism cuts, or None where every rank holds the whole."""
        return next((axis for axis, dim in enumerate(self.dims) if dim in CUT), None)

    def size(self, shape: Shape) -> tuple[int, ...]:
        return tuple(dim.size(shape) for dim in self.dims)


def _row(name: str, hf: str, dims: tuple[Dim, ...], *scaled_by: Dim) -> Row:
    return Row(name, hf, dims, frozenset(scaled_by))


VOCAB, HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = Dim

TABLE: tuple[Row, ...] = (
    _row("embed", "model.embed_tokens.weight", (VOCAB, HIDDEN), HIDDEN),
    _row("layers.{}.attn_norm", "model.layers.{}.input_layernorm.weight", (HIDDEN,), HIDDEN),
    _row("layers.{}.q", "model.layers.{}.self_attn.q_proj.weight", (HEADS, HIDDEN)),
    _row("layers.{}.k", "model.layers.{}.self_attn.k_proj.weight", (KV_HEADS, HIDDEN)),
    _row("layers.{}.v", "model.layers.{}.self_attn.v_proj.weight", (KV_HEADS, HIDDEN)),
    _row("layers.{}.o", "model.layers.{}.self_attn.o_proj.weight", (HIDDEN, HEADS), HIDDEN, HEADS, LAYERS),
    _row("layers.{}.mlp_norm", "model.layers.{}.post_attention_layernorm.weight", (HIDDEN,), HIDDEN),
    _row("layers.{}.gate", "model.layers.{}.mlp.gate_proj.weight", (FFN, HIDDEN)),
    _row("layers.{}.up", "model.layers.{}.mlp.up_proj.weight", (FFN, HIDDEN)),
    _row("layers.{}.down", "model.layers.{}.mlp.down_proj.weight", (HIDDEN, FFN), HIDDEN, FFN, LAYERS),
    _row("norm", "model.norm.weight", (HIDDEN,), HIDDEN),
    _row("lm_head", "lm_head.weight", (VOCAB, HIDDEN)),
)

BY_LEAF = {row.leaf: row for row in TABLE}
LAYER_TABLE = tuple(row for row in TABLE if row.in_layer)
MATRICES = tuple(row for row in LAYER_TABLE if len(row.dims) == 2)

# Tied embeddings: the shared matrix carries HIDDEN, so the final norm, whose output it multiplies, must not.
_TIED_NORM = _row("norm", "model.norm.weight", (HIDDEN,))


def table(tied: bool) -> tuple[Row, ...]:
    """The rows of a model with tied or untied embeddings."""
    if not tied:
        return TABLE
    return tuple(_TIED_NORM if row.name == "norm" else row for row in TABLE if row.name != "lm_head")


@dataclass(frozen=True)
class Param:
    """One parameter of a concrete model: its row, its layer (None outside the layers) and its global size."""

    row: Row
    layer: int | None
    size: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.row.name.format(self.layer)

    @property
    def hf(self) -> str:
        return self.row.hf.format(self.layer)


def params(shape: Shape) -> Iterator[Param]:
    """Every parameter of a model of ``shape``, embedding first, layer by layer, head last."""
    rows = table(shape.tied)
    yield from (Param(row, None, row.size(shape)) for row in rows if row.name == "embed")
    for layer in range(shape.layers):
        yield from (Param(row, layer, row.size(shape)) for row in rows if row.in_layer)
    yield from (Param(row, None, row.size(shape)) for row in rows if row.name in ("norm", "lm_head"))


def count(shape: Shape) -> int:
    """Number of parameters of a model of ``shape``."""
    return sum(prod(param.size) for param in params(shape))
