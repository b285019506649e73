"""Which units a model keeps: sorted indices along every dimension, and masks folded into weights.

A kept unit is one whose mask is not exactly zero. Leaving the others out changes nothing (a pruned unit adds nothing to
the residual stream), so the same cut serves a pruning step on the kept units alone and the extraction of the final
model. ``fold`` multiplies the values of the masks into the weights: always in extraction, in a step where that is
cheaper than masking activations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import shear_kernels
import torch
from torch import Tensor

from shear_tron.dims import UNITS, Dim, Integers, indices, sizes
from shear_tron.masks import LayerMasks, Masks
from shear_tron.params import Row
from shear_tron.shape import Shape
from shear_tron.transfer import sent

Open = Mapping[str, npt.NDArray[np.bool_]]  # by kind: whether a unit's mask is not zero


def _hide(keep: "KeepLayer | Keep", *mappings: str) -> None:
    """Turn dicts into views of them, into which FSDP does not look: it walks all dicts and lists that a module is
    called with, in search of tensors that want a gradient, which cost the host a twentieth of a step."""
    for name in mappings:
        object.__setattr__(keep, name, MappingProxyType(getattr(keep, name)))


@dataclass(frozen=True)
class KeepLayer:
    """What one layer keeps: sorted int64 indices, absent where it keeps all.

    ``axes``: entries of weights, along each dimension. ``units``: entries of masks, along HEADS and FFN.
    """

    axes: Mapping[Dim, Tensor] = field(default_factory=dict)
    units: Mapping[Dim, Tensor] = field(default_factory=dict)
    left_out: bool = False  # the whole layer

    def __post_init__(self) -> None:
        _hide(self, "axes", "units")

    def to(self, device: torch.device) -> "KeepLayer":
        def moved(kept: Mapping[Dim, Tensor]) -> dict[Dim, Tensor]:
            return {dim: indices.to(device) for dim, indices in kept.items()}

        return KeepLayer(moved(self.axes), moved(self.units), self.left_out)

    def select(self, weight: Tensor, row: Row, folded: LayerMasks | None = None) -> Tensor:
        """The kept part of the parameter of ``row``, differentiable; times ``folded``, masks of the kept units that
        scale it (``fold``), in the same pass. A copy of it where ``copies`` holds."""
        axes = [self.axes.get(dim) for dim in row.dims]
        part = _select(weight, axes, _scales(weight, row, folded, axes))
        return part.clone() if part is weight and self.copies else part

    def select_joined(self, weights: Sequence[Tensor], rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
        """The kept parts of matrices that read one input, each of which is cut (``cuts``), one under another in one
        buffer; and how many rows each has there."""
        kept = [self.axes.get(row.dims[0]) for row in rows]
        counts = [len(weight if own is None else own) for weight, own in zip(weights, kept, strict=True)]
        return shear_kernels.select_joined(weights, kept, self.axes.get(rows[0].dims[1])), counts

    def cuts(self, row: Row) -> bool:
        """Whether anything of the parameter of ``row`` is left out."""
        return any(dim in self.axes for dim in row.dims)

    @property
    def copies(self) -> bool:
        """Whether what runs is copies of weights, small ones where not cut: backward then reads no weight itself."""
        return Dim.HIDDEN in self.axes

    def masks(self, masks: LayerMasks) -> LayerMasks:
        """The masks of the kept units of a layer: what its selected weights are run with. ``hidden`` is kept as it is:
        a model selects it once for all its layers."""

        def part(mask: Tensor | None, dim: Dim) -> Tensor | None:
            return None if mask is None else shear_kernels.select(mask, self.units.get(dim))

        return LayerMasks(masks.hidden, part(masks.heads, Dim.HEADS), part(masks.ffn, Dim.FFN), masks.layer)


ALL, LEFT_OUT = KeepLayer(), KeepLayer(left_out=True)


@dataclass(frozen=True)
class Keep:
    """What a model keeps. ``layers`` holds the kept layers by their number; the others are left out whole. ``copies``:
    layers run on copies of their weights (``KeepLayer.copies``), and all ranks know that of each other."""

    hidden: Tensor | None
    layers: Mapping[int, KeepLayer]
    copies: bool = False

    def __post_init__(self) -> None:
        _hide(self, "layers")

    @classmethod
    def of(
        cls,
        masks: Masks,
        shape: Shape,
        pad_to: int = 1,
        device: torch.device | None = None,
        whole: float = 1.0,
        cut_hidden: bool | None = None,
    ) -> "Keep":
        """The units of a model of ``shape`` whose masks are not zero, indices on ``device`` (default: the masks').

        ``pad_to``: hidden and ffn keep some pruned units more, up to a multiple of it, so that matrix units stay
        full. Heads come in blocks of ``head_dim`` rows anyway. ``whole``: where so large a share would be kept, all
        is, and nothing is copied. ``cut_hidden``: whether hidden columns are cut, agreed on by all ranks, whatever each
        samples; None: by ``whole``. At least one unit of each kind is kept in every kept layer. What is kept too much
        has masks of zero, so it is exact. Waits for the masks' device once; not for the CPU.
        """
        for kind, mask in masks.items():
            if tuple(mask.shape) != sizes(shape)[kind]:
                raise ValueError(
                    f"mask {kind} has size {list(mask.shape)}; a model of this shape has {list(sizes(shape)[kind])}"
                )
        device = device or next((mask.device for _, mask in masks.items()), torch.device("cpu"))
        open_ = _open(masks)
        share = whole if cut_hidden is None else inf if cut_hidden else 0
        hidden = _kept(open_, "hidden", None, pad_to, share)
        arrays: dict[tuple[int | None, str, Dim], Integers] = {}
        if hidden is not None:
            arrays[None, "axes", Dim.HIDDEN] = hidden
        numbers = [index for index in range(shape.layers) if "layers" not in open_ or open_["layers"][index]]
        for index in numbers:
            own = {
                kind: units
                for kind in open_
                if UNITS[kind].per_layer and (units := _kept(open_, kind, index, pad_to, whole)) is not None
            }
            for dim in (Dim.HEADS, Dim.KV_HEADS, Dim.FFN):
                for name, factors in (("axes", dim.factors), ("units", dim.units)):
                    if (found := indices(factors, shape, own)) is not None:
                        arrays[index, name, dim] = found
        everywhere: dict[Dim, Tensor] = {}
        parts: dict[str, dict[int, dict[Dim, Tensor]]] = {
            name: {index: {} for index in numbers} for name in ("axes", "units")
        }
        for (layer, name, dim), kept in _to(device, arrays).items():
            (everywhere if layer is None else parts[name][layer])[dim] = kept
        layers = {index: KeepLayer(everywhere | parts["axes"][index], parts["units"][index]) for index in numbers}
        return cls(everywhere.get(Dim.HIDDEN), layers, cut_hidden is True)

    def layer(self, index: int) -> KeepLayer:
        return self.layers.get(index, LEFT_OUT)

    @property
    def outside(self) -> KeepLayer:
        """What parameters outside the layers keep."""
        return KeepLayer({} if self.hidden is None else {Dim.HIDDEN: self.hidden})


def _open(masks: Masks) -> Open:
    """Where each mask is not zero, on the CPU, in one transfer."""
    given = dict(masks.items())
    if not given:
        return {}
    flat = torch.cat([(mask.detach() != 0).flatten() for mask in given.values()]).cpu().numpy()
    ends = np.cumsum([mask.numel() for mask in given.values()])
    return {
        kind: part.reshape(mask.shape)
        for (kind, mask), part in zip(given.items(), np.split(flat, ends[:-1]), strict=True)
    }


def _to(
    device: torch.device, arrays: Mapping[tuple[int | None, str, Dim], Integers]
) -> dict[tuple[int | None, str, Dim], Tensor]:
    """The index lists on ``device``, in one transfer that the host does not wait for."""
    if not arrays:
        return {}
    flat = sent(torch.from_numpy(np.concatenate(list(arrays.values()))), device)
    parts = torch.split(flat, [len(array) for array in arrays.values()])
    return dict(zip(arrays, parts, strict=True))


def _kept(open_: Open, kind: str, layer: int | None, pad_to: int, whole: float) -> Integers | None:
    """Sorted indices of the open units of a kind (in ``layer``) and of as many closed ones as it takes to be a multiple
    of ``pad_to``; None where that is all."""
    if kind not in open_:
        return None
    mask = open_[kind] if layer is None else open_[kind][layer]
    opened = np.flatnonzero(mask)
    pad_to = pad_to if UNITS[kind].fine else 1
    wanted = -(-max(len(opened), 1) // pad_to) * pad_to
    if wanted >= len(mask) * whole:
        return None
    if wanted == len(opened):
        return opened
    return np.sort(np.concatenate((opened, np.flatnonzero(~mask)[: wanted - len(opened)])))


def fold(weight: Tensor, row: Row, masks: LayerMasks) -> Tensor:
    """A weight times the masks that scale it (``Row.scaled_by``): what it multiplies need not be masked any more.

    weight: of the parameter of ``row`` and the units of ``masks``, for example the kept ones of a layer. Computed in at
    least float32, returned in the weight's dtype; differentiable in weight and masks.
    """
    return ALL.select(weight, row, masks)


def _scales(weight: Tensor, row: Row, masks: LayerMasks | None, axes: list[Tensor | None]) -> list[Tensor | None]:
    """What each axis of the kept part of a weight is scaled by: [kept entries], None for nothing."""
    scales: list[Tensor | None] = [None] * len(axes)
    if masks is None:
        return scales
    lengths = [size if kept is None else len(kept) for size, kept in zip(weight.shape, axes, strict=True)]
    for dim in row.scaled_by - {Dim.LAYERS}:
        axis, value = row.dims.index(dim), masks.along(dim)
        if value is not None:
            entries = lengths[axis] // len(value)  # head_dim for a head
            scales[axis] = (value if entries == 1 else value.repeat_interleave(entries)).to(weight.device)
    if Dim.LAYERS in row.scaled_by and masks.layer is not None:
        layer = masks.layer.to(weight.device)
        scales[0] = layer.expand(lengths[0]) if scales[0] is None else scales[0] * layer
    return scales


def _select(weight: Tensor, axes: list[Tensor | None], scales: list[Tensor | None]) -> Tensor:
    """The entries ``axes`` (None: all) of a weight of any number of dimensions, times ``scales``."""
    if weight.dim() <= 2:
        columns, column_scale = (axes[1], scales[1]) if weight.dim() == 2 else (None, None)
        return shear_kernels.select(weight, axes[0], columns, row_scale=scales[0], column_scale=column_scale)
    for axis, kept in enumerate(axes):
        weight = weight if kept is None else weight.index_select(axis, kept)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis, scale in enumerate(scales):
        wide = wide if scale is None else wide * scale.view(-1, *(1,) * (weight.dim() - 1 - axis))
    return wide.to(weight.dtype)
