"""What a step costs: the floating-point operations of its matrix products."""

from collections.abc import Iterable
from math import prod

from shear_tron.keep import Keep
from shear_tron.params import BY_LEAF, MATRICES, Row
from shear_tron.shape import Shape


def flops(
    shape: Shape, layers: Iterable[int], with_head: bool, tokens: int, time: int, keep: Keep | None = None
) -> int:
    """Operations, forward and backward, of these ``layers`` (and the output head) of a model of ``shape``.

    tokens: in sequences of length ``time``; keep: the units that a compact step runs on, padding included.
    A multiply-add is two operations, backward does twice what forward does, causal attention sees half of all pairs.
    What activation checkpointing computes again is not counted, nor is anything but matrix products.
    """

    def size(row: Row, layer: int | None) -> list[int]:
        kept = (None, None) if keep is None else keep.indices(row, layer)
        return [n if units is None else len(units) for n, units in zip(row.size(shape), kept, strict=True)]

    products = prod(size(BY_LEAF["lm_head"], None)) if with_head else 0  # multiply-adds of a token, forward
    for layer in layers:
        if keep is None or layer in keep.layers:
            products += sum(prod(size(row, layer)) for row in MATRICES)
            products += time * size(BY_LEAF["q"], layer)[0]
    return 6 * tokens * products
