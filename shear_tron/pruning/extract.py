"""The dense model that a masked one is: kept rows and columns, with the values of the masks folded in."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import shear_kernels
from torch import Tensor

from shear_tron.keep import Keep, KeepLayer, fold
from shear_tron.masks import LayerMasks, Masks
from shear_tron.params import params
from shear_tron.shape import Shape


def extract(read: Callable[[str], Tensor], masks: Masks, source: Shape) -> tuple[Shape, Iterator[tuple[str, Tensor]]]:
    """The dense model that a masked one is: kept rows and columns, with the values of the masks folded in.

    read: from a parameter's name to its whole tensor in the source, of shape ``source``. Returns the shape of the dense
    model and its (name, tensor) pairs, computed one at a time as they are asked for, in the weights' dtypes. Layers
    whose mask is zero are gone and the rest renumbered. Masks may be soft: a value is multiplied in where it acted,
    and nothing is folded for the norms' width, which counts kept entries (``shear_kernels.reference``).

    Raises ValueError where kept layers keep different counts, and where a tensor has not the size of ``source``.
    """
    masks = masks.map(lambda mask: mask.detach().cpu())
    keep = Keep.of(masks, source)
    if not keep.layers:
        raise ValueError(f"the masks prune all {source.layers} layers; keep at least 1")
    counts = {index: _counts(kept, source) for index, kept in keep.layers.items()}
    first = next(iter(counts))
    for index, layer_counts in counts.items():
        for name, number in layer_counts.items():
            if number != counts[first][name]:
                raise ValueError(
                    f"layer {index} keeps {name}={number}, layer {first} {counts[first][name]}; a dense model has one "
                    "size for all layers, decide masks that keep the same count in each"
                )
    hidden = source.hidden if keep.hidden is None else len(keep.hidden)
    sizes_kept: dict[str, Any] = {**counts[first], "hidden": hidden, "layers": len(keep.layers)}
    target = replace(source, **sizes_kept)
    return target, _dense(read, masks, source, keep, target)


def _counts(kept: KeepLayer, source: Shape) -> dict[str, int]:
    """Sizes of a layer that keeps this."""
    given = {"kv_heads": kept.kv_heads, "heads": kept.heads, "ffn": kept.ffn}
    return {name: int(getattr(source, name)) if units is None else len(units) for name, units in given.items()}


def _dense(
    read: Callable[[str], Tensor], masks: Masks, source: Shape, keep: Keep, target: Shape
) -> Iterator[tuple[str, Tensor]]:
    numbers = list(keep.layers)
    for parameter in params(target):
        layer = None if parameter.layer is None else numbers[parameter.layer]
        name = parameter.row.name.format(layer)
        weight = read(name).detach()
        if tuple(weight.shape) != parameter.row.size(source):
            raise ValueError(
                f"{name} has size {list(weight.shape)}; the source's is {list(parameter.row.size(source))}"
            )
        rows, columns = (
            None if kept is None else kept.to(weight.device) for kept in keep.indices(parameter.row, layer)
        )
        if layer is None:
            values = LayerMasks(None if masks.hidden is None else shear_kernels.select(masks.hidden, keep.hidden))
        else:
            values = keep.layer_masks(masks.layer(layer, source), layer)
        yield parameter.name, fold(shear_kernels.select(weight, rows, columns), parameter.row, values)
