"""What to keep: a value from 0 (pruned) to 1 (kept whole) for each prunable unit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from shear_tron.shape import Shape

# Kinds of structure, in the order of the paper's "from coarse to fine"; the fields of Masks.
KINDS = ("hidden", "layers", "kv_heads", "heads_per_group", "ffn")
CUT_KINDS = frozenset({"kv_heads", "ffn"})  # whose units tensor parallelism deals to its ranks


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one layer. ``heads`` is kv_heads x heads_per_group; ``layer`` is 0-d and gates both branches."""

    hidden: Tensor | None = None  # [hidden]
    heads: Tensor | None = None  # [heads]
    ffn: Tensor | None = None  # [ffn]
    layer: Tensor | None = None  # []


@dataclass(frozen=True)
class Masks:
    """Masks of a whole model; None is all ones, and is what a kind that is not pruned has.

    A query head is kept as far as its key-value head and its place in that head's group are:
    ``heads = kv_heads x heads_per_group``.
    One ``heads_per_group`` mask is shared by all kv_heads of a layer, so every group keeps the same number of heads.
    """

    hidden: Tensor | None = None  # [hidden]
    layers: Tensor | None = None  # [layers]
    kv_heads: Tensor | None = None  # [layers, kv_heads]
    heads_per_group: Tensor | None = None  # [layers, heads / kv_heads]
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
        if self.kv_heads is not None or self.heads_per_group is not None:
            like = self.kv_heads if self.kv_heads is not None else self.heads_per_group
            assert like is not None
            kv_heads = like.new_ones(shape.kv_heads) if self.kv_heads is None else self.kv_heads[index]
            heads_per_group = (
                like.new_ones(shape.heads_per_group) if self.heads_per_group is None else self.heads_per_group[index]
            )
            heads = torch.outer(kv_heads, heads_per_group).flatten()
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
        "kv_heads": (shape.layers, shape.kv_heads),
        "heads_per_group": (shape.layers, shape.heads_per_group),
        "ffn": (shape.layers, shape.ffn),
    }
