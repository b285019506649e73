"""The table of parameters: one row per kind. Most of the project follows from it.

A row says what a parameter is called, where it lives, which dimensions it spans, and which masks its values are scaled
by when a mask is folded into the weights. From it come: parameter counts, what tensor parallelism cuts and how
gradients are summed, which rows and columns a mask selects, and where its values go. What other formats call a
parameter is theirs to know (``shear_tron.checkpoint.names``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Literal

from shear_tron.architecture import Architecture
from shear_tron.dims import Dim
from shear_tron.shape import Shape

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = Dim


@dataclass(frozen=True)
class Row:
    """One kind of parameter.

    ``where`` it lives: on the first pipeline stage, in every layer, or on the last stage. ``acts_on``: what the weight
    meets. The gradient of a weight that every tensor-parallel rank holds whole is a part of a sum where ranks saw
    different things: always if it acts on what is cut (this rank's heads), and if it acts on tokens, where those are
    cut (sequence parallelism).
    """

    leaf: str  # name within its module: ``q`` for ``layers.3.q``
    dims: tuple[Dim, ...]
    scaled_by: frozenset[Dim] = frozenset()
    where: Literal["first", "layer", "last"] = "layer"
    acts_on: Literal["tokens", "cut"] = "tokens"

    @cached_property
    def cut_axis(self) -> int | None:
        """The axis that tensor parallelism cuts, or None where every rank holds the whole."""
        return next((axis for axis, dim in enumerate(self.dims) if dim.is_cut), None)

    def name(self, layer: int | None) -> str:
        return self.leaf if layer is None else f"layers.{layer}.{self.leaf}"

    def size(self, shape: Shape) -> tuple[int, ...]:
        return tuple(dim.size(shape) for dim in self.dims)

    def bias(self) -> "Row":
        """The row of this weight's bias: what it adds is scaled as what the weight gives, but not as what it reads."""
        scaled_by = self.scaled_by - set(self.dims[1:])
        return Row(f"{self.leaf}_bias", self.dims[:1], scaled_by, self.where, self.acts_on)


def _row(leaf: str, dims: tuple[Dim, ...], *scaled_by: Dim) -> Row:
    return Row(leaf, dims, frozenset(scaled_by))


@cache
def rows(architecture: Architecture) -> tuple[Row, ...]:
    """The rows of a model: embedding first, those of a layer, final norm and head last; a bias after its weight."""
    tied = architecture.shape.tied
    of_heads = [Row(leaf, (HEAD_DIM,), acts_on="cut") for leaf in ("q_norm", "k_norm")]
    weights = [
        Row("embed", (VOCAB, HIDDEN), frozenset({HIDDEN}), "first"),
        _row("attn_norm", (HIDDEN,), HIDDEN),
        _row("q", (HEADS, HIDDEN)),
        _row("k", (KV_HEADS, HIDDEN)),
        _row("v", (KV_HEADS, HIDDEN)),
        *(of_heads if architecture.qk_norm else []),
        _row("o", (HIDDEN, HEADS), HIDDEN, HEADS, LAYERS),
        _row("mlp_norm", (HIDDEN,), HIDDEN),
        *([_row("gate", (FFN, HIDDEN))] if architecture.mlp == "swiglu" else []),
        _row("up", (FFN, HIDDEN)),
        _row("down", (HIDDEN, FFN), HIDDEN, FFN, LAYERS),
        # Tied embeddings: the shared matrix carries HIDDEN, so the final norm, whose output it multiplies, must not.
        Row("norm", (HIDDEN,), frozenset() if tied else frozenset({HIDDEN}), "last"),
        *([] if tied else [Row("lm_head", (VOCAB, HIDDEN), where="last")]),
    ]
    with_bias = set(architecture.biases)
    if architecture.norm == "layer":
        with_bias |= {"attn_norm", "mlp_norm", "norm"}
    leaves = [row.leaf for row in weights]
    for leaf in sorted(with_bias):
        if leaf not in leaves:
            raise ValueError(f"biases holds {leaf!r}, which this model lacks; use some of {', '.join(leaves)}")
    return tuple(row for w in weights for row in ([w, w.bias()] if w.leaf in with_bias else [w]))


@cache
def by_leaf(architecture: Architecture) -> dict[str, Row]:
    return {row.leaf: row for row in rows(architecture)}


@cache
def layer_rows(architecture: Architecture) -> tuple[Row, ...]:
    return tuple(row for row in rows(architecture) if row.where == "layer")


@cache
def matrices(architecture: Architecture) -> tuple[Row, ...]:
    """Rows of the matrices of a layer."""
    return tuple(row for row in layer_rows(architecture) if len(row.dims) > 1)


@dataclass(frozen=True)
class Param:
    """One parameter of a concrete model: its row, its layer (None outside the layers) and its global size."""

    row: Row
    layer: int | None
    size: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.row.name(self.layer)


def params(architecture: Architecture) -> Iterator[Param]:
    """Every parameter of a model: embedding first, layer by layer, head last."""
    shape, table = architecture.shape, rows(architecture)
    yield from (Param(row, None, row.size(shape)) for row in table if row.where == "first")
    for layer in range(shape.layers):
        yield from (Param(row, layer, row.size(shape)) for row in table if row.where == "layer")
    yield from (Param(row, None, row.size(shape)) for row in table if row.where == "last")


def count(architecture: Architecture) -> int:
    """Number of parameters of a model, whose layers are alike."""
    shape = architecture.shape
    return sum(prod(row.size(shape)) * (shape.layers if row.where == "layer" else 1) for row in rows(architecture))
