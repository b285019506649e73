"""What a step costs: the floating-point operations of its matrix products."""

from collections.abc import Collection
from math import prod

from shear_tron.architecture import Architecture
from shear_tron.keep import ALL, Keep, KeepLayer
from shear_tron.params import Row, by_leaf, matrices


def flops(
    architecture: Architecture,
    layers: Collection[int],
    with_head: bool,
    tokens: int,
    time: int,
    keep: Keep | None = None,
) -> int:
    """Operations, forward and backward, of these ``layers`` (and the output head) of a model.

    tokens: in sequences of length ``time``; keep: the units that a compact step runs on, padding included.
    A multiply-add is two operations, backward does twice what forward does, causal attention sees half of all pairs.
    What activation checkpointing computes again is not counted, nor is anything but matrix products.
    """

    def size(row: Row, kept: KeepLayer) -> list[int]:
        axes = zip(row.size(architecture.shape), row.dims, strict=True)
        return [len(kept.axes[dim]) if dim in kept.axes else n for n, dim in axes]

    def of_layer(kept: KeepLayer) -> int:
        if kept.left_out:
            return 0
        return sum(prod(size(row, kept)) for row in matrices(architecture)) + time * size(table["q"], kept)[0]

    table = by_leaf(architecture)
    head = table["embed" if architecture.shape.tied else "lm_head"]
    outside = ALL if keep is None else keep.outside
    products = prod(size(head, outside)) if with_head else 0  # multiply-adds of a token, forward
    if keep is None:
        products += len(layers) * of_layer(ALL)
    else:
        products += sum(of_layer(keep.layer(layer)) for layer in layers)
    return 6 * tokens * products
