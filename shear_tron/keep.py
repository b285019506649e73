"""Which units a model keeps: sorted indices, the rows and columns they are, and masks folded into weights.

A kept unit is one whose mask is not exactly zero. Leaving the others out changes nothing (a pruned unit adds nothing to
the residual stream), so the same cut serves a pruning step on the kept units alone and the extraction of the final
model. ``fold`` multiplies the values of the masks into the weights: always in extraction, in a step where that is
cheaper than masking activations.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import shear_kernels
import torch
from torch import Tensor

from shear_tron.masks import LayerMasks, Masks, sizes
from shear_tron.params import Dim, Row
from shear_tron.shape import Shape


@dataclass(frozen=True)
class KeepLayer:
    """What one layer keeps: sorted indices, None where it keeps all. A head's rows are its ``head_dim`` rows of q."""

    kv_heads: Tensor | None = None
    heads: Tensor | None = None  # query heads: every kept query of every kept group
    ffn: Tensor | None = None
    kv_head_rows: Tensor | None = None
    head_rows: Tensor | None = None


@dataclass(frozen=True)
class Keep:
    """What a model keeps. ``layers`` holds the kept layers by their number; the others are left out whole."""

    hidden: Tensor | None
    layers: Mapping[int, KeepLayer]

    @classmethod
    def of(
        cls, masks: Masks, shape: Shape, pad_to: int = 1, device: torch.device | None = None, whole: float = 1.0
    ) -> "Keep":
        """The units of a model of ``shape`` whose masks are not zero, indices on ``device`` (default: the masks').

        ``pad_to``: hidden and ffn keep some pruned units more, up to a multiple of it, so that matrix units stay
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
        hidden = _kept(open_.hidden, pad_to, whole)
        layers: dict[int, dict[str, Tensor | None]] = {}
        for index in range(shape.layers):
            if open_.layers is None or open_.layers[index]:
                layers[index] = _keep_layer(open_, index, shape, pad_to, whole)
        hidden, *rest = _to(device, [hidden, *(kept for layer in layers.values() for kept in layer.values())])
        indices = iter(rest)
        return cls(hidden, {i: KeepLayer(**{name: next(indices) for name in names}) for i, names in layers.items()})

    def indices(self, row: Row, layer: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns to ``select`` of the parameter of ``row`` in ``layer`` (None outside the layers)."""
        kept = KeepLayer() if layer is None else self.layers[layer]
        by_dim = {
            Dim.HIDDEN: self.hidden,
            Dim.HEADS: kept.head_rows,
            Dim.KV_HEADS: kept.kv_head_rows,
            Dim.FFN: kept.ffn,
        }
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


def _kept(open_: Tensor | None, pad_to: int, whole: float) -> Tensor | None:
    """Sorted indices of the open units and of as many closed ones as it takes; None where that is all."""
    if open_ is None:
        return None
    opened, closed = open_.nonzero().flatten(), (~open_).nonzero().flatten()
    wanted = -(-max(len(opened), 1) // pad_to) * pad_to
    if wanted >= len(open_) * whole:
        return None
    return torch.cat((opened, closed[: wanted - len(opened)])).sort().values


def _keep_layer(open_: Masks, index: int, shape: Shape, pad_to: int, whole: float) -> dict[str, Tensor | None]:
    """The fields of ``KeepLayer``."""
    kv_heads = None if open_.kv_heads is None else _kept(open_.kv_heads[index], 1, whole)
    heads_per_group = None if open_.heads_per_group is None else _kept(open_.heads_per_group[index], 1, whole)
    heads = None
    if kv_heads is not None or heads_per_group is not None:
        all_kv_heads = torch.arange(shape.kv_heads) if kv_heads is None else kv_heads
        heads = _expand(all_kv_heads, shape.heads_per_group, heads_per_group)
    return {
        "kv_heads": kv_heads,
        "heads": heads,
        "ffn": None if open_.ffn is None else _kept(open_.ffn[index], pad_to, whole),
        "kv_head_rows": None if kv_heads is None else _expand(kv_heads, shape.head_dim),
        "head_rows": None if heads is None else _expand(heads, shape.head_dim),
    }


def _expand(blocks: Tensor, length: int, within: Tensor | None = None) -> Tensor:
    """Indices of the entries (or of those ``within``) of blocks of ``length`` entries each."""
    within = torch.arange(length) if within is None else within
    return (blocks[:, None] * length + within).flatten()


def fold(weight: Tensor, row: Row, masks: LayerMasks) -> Tensor:
    """A weight times the masks that scale it (``Row.scaled_by``): what it multiplies need not be masked any more.

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
