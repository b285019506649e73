"""Tensor and sequence parallelism: weights stored as DTensor shards, computed on as plain tensors.

Storing them as DTensors lets FSDP, gradient clipping and checkpoints see how they are cut; computing on local tensors
between ``enter`` and ``leave`` (Megatron-LM's g and g-bar, or f and its conjugate without sequence parallelism) gives
every kernel a plain tensor.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from shear_tron.dims import CUT_KINDS
from shear_tron.keep import Keep
from shear_tron.masks import Masks
from shear_tron.model.split import Split
from shear_tron.params import Row
from shear_tron.shape import Shape


class TensorParallel(Split):
    """One rank's view of a model cut by heads, feed-forward columns and vocabulary (and, with ``sequence``, tokens)."""

    def __init__(self, mesh: DeviceMesh, sequence: bool) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.sequence = sequence and self.size > 1
        if self.size > 1:
            self.all_reduce_max = lambda x: _all_reduced(x, dist.ReduceOp.MAX, self.group)
            self.all_reduce_sum = lambda x: _all_reduced(x, dist.ReduceOp.SUM, self.group)

    def weight(self, parameter: Tensor, row: Row) -> Tensor:
        if self.size == 1:
            return parameter  # which FSDP has gathered to a plain tensor
        assert isinstance(parameter, DTensor)
        # The gradient of a weight that every rank holds whole is a part of a sum where ranks saw different things: this
        # rank's heads, or under sequence parallelism its tokens.
        whole: Placement = Partial() if self.sequence or row.acts_on == "cut" else Replicate()
        return parameter.to_local(grad_placements=[whole] if row.cut_axis is None else None)

    def enter(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        return _apply(_Gather if self.sequence else _Copy, x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        return _apply(_ReduceScatter if self.sequence else _Reduce, x, self.group)

    def part(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or self.size == 1:
            return mask
        each = mask.shape[0] // self.size
        return mask[self.rank * each : (self.rank + 1) * each]

    def shared(self, mask: Tensor | None) -> Tensor | None:
        if mask is None or self.size == 1 or self.sequence:
            return mask
        return _apply(_ScaleGradient, mask, 1 / self.size)  # every rank has the whole gradient

    def placement(self, row: Row) -> Placement:
        return Replicate() if row.cut_axis is None else Shard(row.cut_axis)

    def bounds(self, row: Row, size: tuple[int, ...]) -> tuple[int, int]:
        """This rank's (start, stop) along ``row.cut_axis`` of a weight of global ``size``."""
        assert row.cut_axis is not None
        each = size[row.cut_axis] // self.size
        return self.rank * each, (self.rank + 1) * each

    def parameter(self, part: Tensor, row: Row) -> nn.Parameter:
        """The parameter of which this rank holds ``part``: a plain one where nothing is cut, which saves the host a
        DTensor in every use."""
        if self.size == 1:
            return nn.Parameter(part)
        return nn.Parameter(DTensor.from_local(part, self.mesh, [self.placement(row)], run_check=False))


def keep_part(
    masks: Masks,
    shape: Shape,
    rank: int,
    size: int,
    pad_to: int,
    device: torch.device,
    whole: float = 1.0,
    cut_hidden: bool | None = None,
) -> Keep:
    """``Keep.of`` among the heads and columns of tensor-parallel ``rank`` of ``size``, of a model of ``shape``."""
    own = {kind: mask.chunk(size, dim=1)[rank] if kind in CUT_KINDS else mask for kind, mask in masks.items()}
    return Keep.of(Masks(**own), shape_of_part(shape, size), pad_to, device, whole, cut_hidden)


def shape_of_part(shape: Shape, size: int) -> Shape:
    """What one of ``size`` tensor-parallel ranks holds of a model of ``shape``."""
    cut = ("vocab", "heads", "kv_heads", "ffn")
    return replace(shape, **{name: getattr(shape, name) // size for name in cut})


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _all_reduced(x: Tensor, op: Any, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(x, op, group)
    return x


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group)
    return out


def _reduce_scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    """[tokens / size, hidden] -> [tokens, hidden]; backward sums the ranks' gradients and cuts them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scattered(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Sum of the ranks' [tokens, hidden], cut to this rank's tokens; backward gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group), None


class _Copy(torch.autograd.Function):
    """The identity; backward sums the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad.contiguous().clone(), dist.ReduceOp.SUM, ctx.group), None


class _Reduce(torch.autograd.Function):
    """Sum of the ranks' tensors; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(x.contiguous().clone(), dist.ReduceOp.SUM, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScaleGradient(torch.autograd.Function):
    """The identity; backward scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
