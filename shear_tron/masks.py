"""What to keep: a value from 0 (pruned) to 1 (kept whole) for each prunable unit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from torch import Tensor

from shear_tron.dims import UNITS, Dim, along
from shear_tron.shape import Shape


@dataclass(frozen=True)
class LayerMasks:
    """The masks of one layer. ``heads`` is kv_heads x heads_per_group; ``layer`` is 0-d and gates both branches."""

    hidden: Tensor | None = None  # [hidden]
    heads: Tensor | None = None  # [heads]
    ffn: Tensor | None = None  # [ffn]
    layer: Tensor | None = None  # []

    def along(self, dim: Dim) -> Tensor | None:
        """The mask that scales what lies along ``dim``."""
        return {Dim.LAYERS: self.layer, Dim.HIDDEN: self.hidden, Dim.HEADS: self.heads, Dim.FFN: self.ffn}[dim]


@dataclass(frozen=True)
class Masks:
    """Masks of a whole model; None is all ones, and is what a kind that is not pruned has.

    A query head is kept as far as its key-value head and its place in that head's group are:
    ``heads = kv_heads x heads_per_group``. One ``heads_per_group`` mask is shared by all groups of a layer, so every
    group keeps the same number of heads.
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
        own = {kind: mask[index] for kind, mask in self.items() if UNITS[kind].per_layer}
        return LayerMasks(
            hidden=self.hidden,
            heads=along(Dim.HEADS, shape, own),
            ffn=own.get("ffn"),
            layer=None if self.layers is None else self.layers[index],
        )


NO_MASKS = Masks()
