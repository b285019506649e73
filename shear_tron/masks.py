"""What to keep: a value from 0 (pruned) to 1 (kept whole) for each prunable unit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from shear_tron.shape import Shape

# Kinds of structure, in the order of the paper's "from coarse to fine"; the fields of Masks.
KINDS = ("hidden", "layers", "groups", "queries", "ffn")
CUT_KINDS = frozenset({"groups", "ffn"})  # whose units tensor parallelism deals to its ranks


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one layer. ``heads`` is groups x queries; ``layer`` is 0-d and gates attention and MLP together."""

    hidden: Tensor | None = None  # [hidden]
    heads: Tensor | None = None  # [heads]
    ffn: Tensor | None = None  # [ffn]
    layer: Tensor | None = None  # []


@dataclass(frozen=True)
class Masks:
    """Masks of a whole model; None is all ones, and is what a kind that is not pruned has.

    A query head is kept as far as its key-value group and its place within the group are: ``heads = groups x queries``.
    One ``queries`` mask is shared by all groups of a layer, so every group keeps the same number of heads.
    """

    hidden: Tensor | None = None  # [hidden]
    layers: Tensor | None = None  # [layers]
    groups: Tensor | None = None  # [layers, kv_heads]
    queries: Tensor | None = None  # [layers, heads / kv_heads]
    ffn: Tensor | None = None  # [layers, ffn]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(kind, mask) of the kinds that have one."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def map(self, function: Callable[[Tensor], Tensor]) -> "Masks":
        return replace(self, **{kind: function(mask) for kind, mask in self.items()})

    def layer(self, index: int, shape: Shape) -> LayerMasks:
        """The masks of layer ``index`` of a model of ``shape``."""
        heads = None
        if self.groups is not None or self.queries is not None:
            like = self.groups if self.groups is not None else self.queries
            assert like is not None
            groups = like.new_ones(shape.kv_heads) if self.groups is None else self.groups[index]
            queries = like.new_ones(shape.queries) if self.queries is None else self.queries[index]
            heads = torch.outer(groups, queries).flatten()
        return LayerMasks(
            hidden=self.hidden,
            heads=heads,
            ffn=None if self.ffn is None else self.ffn[index],
            layer=None if self.layers is None else self.layers[index],
        )


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Size of each kind's mask for a model of ``shape``."""
    return {
        "hidden": (shape.hidden,),
        "layers": (shape.layers,),
        "groups": (shape.layers, shape.kv_heads),
        "queries": (shape.layers, shape.queries),
        "ffn": (shape.layers, shape.ffn),
    }
