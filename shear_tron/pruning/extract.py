"""The dense model that a masked one is: kept rows and columns, with the values of the masks folded in."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import shear_kernels
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import Dim
from shear_tron.keep import Keep, KeepLayer
from shear_tron.masks import LayerMasks, Masks
from shear_tron.params import params
from shear_tron.shape import Shape


def extract(
    read: Callable[[str], Tensor], masks: Masks, source: Architecture
) -> tuple[Architecture, Iterator[tuple[str, Tensor]]]:
    """The dense model that a masked one is: kept rows and columns, with the values of the masks folded in.

    read: from a parameter's name to its whole tensor in the source. Returns the architecture of the dense model and its
    (name, tensor) pairs, computed one at a time as they are asked for, in the weights' dtypes. Layers whose mask is
    zero are gone and the rest renumbered. Masks may be soft: a value is multiplied in where it acted, and nothing is
    folded for the norms' width, which counts kept entries (``shear_kernels.reference``).

    Raises ValueError where kept layers keep different counts, and where a tensor has not the size of ``source``.
    """
    masks = masks.map(lambda mask: mask.detach().cpu())
    shape = source.shape
    keep = Keep.of(masks, shape)
    if not keep.layers:
        raise ValueError(f"the masks prune all {shape.layers} layers; keep at least 1")
    counts = {index: _counts(kept, shape) for index, kept in keep.layers.items()}
    first = next(iter(counts))
    for index, layer_counts in counts.items():
        for name, number in layer_counts.items():
            if number != counts[first][name]:
                raise ValueError(
                    f"layer {index} keeps {name}={number}, layer {first} {counts[first][name]}; a dense model has one "
                    "size for all layers, decide masks that keep the same count in each"
                )
    hidden = shape.hidden if keep.hidden is None else len(keep.hidden)
    sizes_kept: dict[str, Any] = {**counts[first], "hidden": hidden, "layers": len(keep.layers)}
    target = source.keep_layers(replace(shape, **sizes_kept), list(keep.layers))
    return target, _dense(read, masks, source, keep, target)


def _counts(kept: KeepLayer, shape: Shape) -> dict[str, int]:
    """Sizes of a layer that keeps this."""
    by_dim = {"kv_heads": Dim.KV_HEADS, "heads": Dim.HEADS, "ffn": Dim.FFN}
    return {
        name: len(kept.units[dim]) if dim in kept.units else int(getattr(shape, name)) for name, dim in by_dim.items()
    }


def _dense(
    read: Callable[[str], Tensor], masks: Masks, source: Architecture, keep: Keep, target: Architecture
) -> Iterator[tuple[str, Tensor]]:
    numbers = list(keep.layers)
    hidden = None if masks.hidden is None else shear_kernels.select(masks.hidden, keep.hidden)
    for parameter in params(target):
        layer = None if parameter.layer is None else numbers[parameter.layer]
        name = parameter.row.name(layer)
        weight, size = read(name).detach(), parameter.row.size(source.shape)
        if tuple(weight.shape) != size:
            raise ValueError(f"{name} has size {list(weight.shape)}; the source's is {list(size)}")
        kept, values = keep.outside, LayerMasks(hidden)
        if layer is not None:
            kept = keep.layers[layer]
            values = kept.masks(replace(masks.layer(layer, source.shape), hidden=hidden))
        yield parameter.name, kept.to(weight.device).select(weight, parameter.row, values)
