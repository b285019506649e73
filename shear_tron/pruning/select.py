"""Cutting a model down to its kept units: which rows and columns they are, gathering them, and the dense model of them.

A kept unit is one whose mask is not exactly zero. Leaving the others out changes nothing (a pruned unit adds nothing to
the residual stream), so the same cut serves a pruning step on the kept units alone and the extraction of the final
model. ``fold`` multiplies the values of the masks into the weights: always in extraction, in a step where that is
cheaper than masking activations.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import shear_kernels
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shear_tron.masks import LayerMasks, Masks, sizes
from shear_tron.params import Dim, Param, named
from shear_tron.shape import Shape


def spread(x: Tensor, columns: Tensor | None, width: int) -> Tensor:
    """The inverse of selecting ``columns`` of [n, width]: x in its columns, zeros in the others. Differentiable."""
    return x if columns is None else x.new_zeros(x.shape[0], width).index_copy(1, columns, x)


def untouched(x: Tensor, weights: list[Tensor]) -> Tensor:
    """``x`` itself, with gradients of zero for ``weights``: a layer left out whole.

    FSDP waits for a gradient of every weight it gathered, and other ranks may not have left the layer out.
    """
    return cast(Tensor, _Untouched.apply(x, *weights))  # type: ignore[no-untyped-call]


class _Untouched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return x.clone()  # FSDP warns of modules that return views

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(weight) for weight in ctx.saved_tensors)


@dataclass(frozen=True)
class KeepLayer:
    """What one layer keeps: sorted indices, None where it keeps all. A head's rows are its ``head_dim`` rows of q."""

    groups: Tensor | None = None  # key-value groups
    heads: Tensor | None = None  # query heads: every kept query of every kept group
    ffn: Tensor | None = None
    group_rows: Tensor | None = None
    head_rows: Tensor | None = None


@dataclass(frozen=True)
class Keep:
    """What a model keeps. ``layers`` holds the kept layers by their number; the others are left out whole."""

    hidden: Tensor | None
    layers: Mapping[int, KeepLayer]

    @classmethod
    def of(
        cls, masks: Masks, shape: Shape, multiple: int = 1, device: torch.device | None = None, whole: float = 1.0
    ) -> "Keep":
        """The units of a model of ``shape`` whose masks are not zero, indices on ``device`` (default: the masks').

        ``multiple``: hidden and ffn keep some pruned units more, up to a multiple of it, so that matrix units stay
        full. Heads come in blocks of ``head_dim`` rows anyway. ``whole``: where so large a share would be kept, all
        is, and nothing is copied. At least one unit of each kind is kept in every kept layer. What is kept too much
        has masks of zero, so it is exact. Waits for the masks' device once; not for the CPU.
        """
        for kind, mask in masks.items():
            if tuple(mask.shape) != sizes(shape)[kind]:
                raise ValueError(
                    f"mask {kind} has size {list(mask.shape)}; a model of this shape has {list(sizes(shape)[kind])}"
                )
        device = device or next((mask.device for _, mask in masks.items()), torch.device("cpu"))
        open_ = _to_cpu(masks)
        hidden = _kept(open_.hidden, multiple, whole)
        layers: dict[int, dict[str, Tensor | None]] = {}
        for index in range(shape.layers):
            if open_.layers is None or open_.layers[index]:
                layers[index] = _keep_layer(open_, index, shape, multiple, whole)
        hidden, *rest = _to(device, [hidden, *(kept for layer in layers.values() for kept in layer.values())])
        indices = iter(rest)
        return cls(hidden, {i: KeepLayer(**{name: next(indices) for name in names}) for i, names in layers.items()})

    def indices(self, row: Param, layer: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns to ``select`` of the parameter of ``row`` in ``layer`` (None outside the layers)."""
        kept = KeepLayer() if layer is None else self.layers[layer]
        by_dim = {Dim.HIDDEN: self.hidden, Dim.HEADS: kept.head_rows, Dim.KV_HEADS: kept.group_rows, Dim.FFN: kept.ffn}
        axes = [by_dim.get(dim) for dim in row.dims]
        return axes[0], axes[1] if len(axes) == 2 else None

    def layer_masks(self, masks: LayerMasks, layer: int) -> LayerMasks:
        """The masks of the kept units of a kept layer: what the layer's selected weights are run with."""

        def part(mask: Tensor | None, kept: Tensor | None) -> Tensor | None:
            return None if mask is None else shear_kernels.select(mask, kept)

        kept = self.layers[layer]
        return LayerMasks(
            part(masks.hidden, self.hidden), part(masks.heads, kept.heads), part(masks.ffn, kept.ffn), masks.layer
        )


def _to_cpu(masks: Masks) -> Masks:
    """Where each mask is not zero, on the CPU, in one transfer."""
    flat = [(mask.detach() != 0).flatten() for _, mask in masks.items()]
    if not flat:
        return masks
    parts = iter(torch.split(torch.cat(flat).cpu(), [len(part) for part in flat]))
    return masks.map(lambda mask: next(parts).view(mask.shape))


def _to(device: torch.device, indices: list[Tensor | None]) -> list[Tensor | None]:
    """The index lists on ``device``, in one transfer."""
    given = [kept for kept in indices if kept is not None]
    if device.type == "cpu" or not given:
        return indices
    parts = iter(torch.split(torch.cat(given).to(device), [len(kept) for kept in given]))
    return [None if kept is None else next(parts) for kept in indices]


def _kept(open_: Tensor | None, multiple: int, whole: float) -> Tensor | None:
    """Sorted indices of the open units and of as many closed ones as it takes; None where that is all."""
    if open_ is None:
        return None
    opened, closed = open_.nonzero().flatten(), (~open_).nonzero().flatten()
    wanted = -(-max(len(opened), 1) // multiple) * multiple
    if wanted >= len(open_) * whole:
        return None
    return torch.cat((opened, closed[: wanted - len(opened)])).sort().values


def _keep_layer(open_: Masks, index: int, shape: Shape, multiple: int, whole: float) -> dict[str, Tensor | None]:
    """The fields of ``KeepLayer``."""
    groups = None if open_.groups is None else _kept(open_.groups[index], 1, whole)
    queries = None if open_.queries is None else _kept(open_.queries[index], 1, whole)
    heads = None
    if groups is not None or queries is not None:
        all_groups = torch.arange(shape.kv_heads) if groups is None else groups
        heads = _expand(all_groups, shape.queries, queries)
    return {
        "groups": groups,
        "heads": heads,
        "ffn": None if open_.ffn is None else _kept(open_.ffn[index], multiple, whole),
        "group_rows": None if groups is None else _expand(groups, shape.head_dim),
        "head_rows": None if heads is None else _expand(heads, shape.head_dim),
    }


def _expand(blocks: Tensor, length: int, within: Tensor | None = None) -> Tensor:
    """Indices of the entries (or of those ``within``) of blocks of ``length`` entries each."""
    within = torch.arange(length) if within is None else within
    return (blocks[:, None] * length + within).flatten()


def fold(weight: Tensor, row: Param, masks: LayerMasks) -> Tensor:
    """A weight times the masks that scale it (``Param.scaled_by``): what it multiplies need not be masked any more.

    weight: of the parameter of ``row`` and the units of ``masks``, for example the kept ones of a layer. Computed in at
    least float32, returned in the weight's dtype; differentiable in weight and masks.
    """
    values = {Dim.LAYERS: masks.layer, Dim.HIDDEN: masks.hidden, Dim.HEADS: masks.heads, Dim.FFN: masks.ffn}
    scale: Tensor | None = None
    for dim, value in values.items():
        if value is None or dim not in row.scaled_by:
            continue
        if dim is not Dim.LAYERS:
            axis = row.dims.index(dim)
            value = value.repeat_interleave(weight.shape[axis] // len(value))  # a head has head_dim columns
            value = value[:, None] if axis == 0 and weight.dim() == 2 else value
        scale = value if scale is None else scale * value
    if scale is None:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (wide * scale.to(weight.device)).to(weight.dtype)


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
    given = {"kv_heads": kept.groups, "heads": kept.heads, "ffn": kept.ffn}
    return {name: int(getattr(source, name)) if units is None else len(units) for name, units in given.items()}


def _dense(
    read: Callable[[str], Tensor], masks: Masks, source: Shape, keep: Keep, target: Shape
) -> Iterator[tuple[str, Tensor]]:
    numbers = list(keep.layers)
    for parameter in named(target):
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
