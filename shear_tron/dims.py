"""A dimension of a weight is a product of factors, and some factors are units that can be pruned.

A row of ``q`` is (key-value head, query head of its group, entry of the head); a kept row is a kept unit of every
factor. Two functions follow for any weight, whatever its dimensions: which ``indices`` of an axis are kept, and which
mask values lie ``along`` it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shear_tron.shape import Shape

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Unit:
    """A kind of structure that can be pruned."""

    per_layer: bool  # every layer has its own, with a mask of its own
    cut: bool = False  # dealt to tensor-parallel ranks
    fine: bool = False  # so many that a few kept too much cost nothing: kept counts may be padded


# From coarse to fine as in the paper's section 2.1. The names are sizes of a Shape, and the fields of Masks.
UNITS = {
    "hidden": Unit(per_layer=False, fine=True),
    "layers": Unit(per_layer=False),
    "kv_heads": Unit(per_layer=True, cut=True),
    "heads_per_group": Unit(per_layer=True),
    "ffn": Unit(per_layer=True, cut=True, fine=True),
}
KINDS = tuple(UNITS)
CUT_KINDS = frozenset(kind for kind, unit in UNITS.items() if unit.cut)


class Dim(Enum):
    """A dimension of a weight, or (LAYERS) of the stack of layers; its value is its factors, the slowest first."""

    VOCAB = ("vocab",)
    HIDDEN = ("hidden",)
    HEADS = ("kv_heads", "heads_per_group", "head_dim")
    KV_HEADS = ("kv_heads", "head_dim")
    HEAD_DIM = ("head_dim",)
    FFN = ("ffn",)
    LAYERS = ("layers",)

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(self.value)

    @property
    def units(self) -> tuple[str, ...]:
        """The factors that can be pruned."""
        return tuple(factor for factor in self.factors if factor in UNITS)

    @property
    def is_cut(self) -> bool:
        """Whether tensor parallelism cuts axes of this dimension; HIDDEN is whole on every rank."""
        return self is Dim.VOCAB or not CUT_KINDS.isdisjoint(self.factors)

    def size(self, shape: Shape) -> int:
        """Length of an axis of this dimension in a weight of a model of ``shape``."""
        return prod(int(getattr(shape, factor)) for factor in self.factors)


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Size of each kind's mask for a model of ``shape``: [units] or [layers, units]."""
    return {
        kind: (shape.layers, getattr(shape, kind)) if unit.per_layer else (getattr(shape, kind),)
        for kind, unit in UNITS.items()
    }


def indices(factors: Sequence[str], shape: Shape, kept: Mapping[str, Integers]) -> Integers | None:
    """Sorted indices of what is kept along an axis that is the product of ``factors``; None where that is all.

    kept: sorted indices of the kept units by factor; a factor that is absent is kept whole.
    """
    if kept.keys().isdisjoint(factors):
        return None
    found = np.zeros(1, np.int64)
    for factor in factors:
        size = int(getattr(shape, factor))
        found = (found[:, None] * size + kept.get(factor, np.arange(size))).ravel()
    return found


def along(dim: Dim, shape: Shape, masks: Mapping[str, Tensor | None]) -> Tensor | None:
    """The mask along an axis of ``dim``, one value for each unit of it: the product of its factors' masks.

    masks: [units] by factor, None or absent where a kind is not pruned. HEADS gives [heads], each value standing for
    ``head_dim`` entries. None where nothing is masked.
    """
    given = [mask for unit in dim.units if (mask := masks.get(unit)) is not None]
    if not given:
        return None
    out: Tensor | None = None
    for unit in dim.units:
        mask = masks.get(unit)
        value = given[0].new_ones(getattr(shape, unit)) if mask is None else mask
        out = value if out is None else torch.outer(out, value).flatten()
    return out
