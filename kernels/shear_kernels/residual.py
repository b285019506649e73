# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""The gated residual addition in Triton, where no norm follows that would take it along (norm_kernels.py).

    out = residual + branch * layer_gate * mask
    dresidual = dout,   dbranch = dout * layer_gate * mask
    dmask = layer_gate * sum over tokens of dout * branch,   dlayer_gate = sum of dout * branch * mask;   0 where 0

One program holds a row in registers. 6 bytes an element of 2 either way; PyTorch's products and sum in float32 move
several times that.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels import reference
from shear_kernels.norm import BACKWARD_PROGRAMS, WIDEST, block_and_warps
from shear_kernels.precision import narrow
from shear_kernels.torch_op import nothing, torch_op


@triton.jit
def gated_residual_forward(
    residual, branch, mask, layer, out, hidden,
    HAS_MASK: tl.constexpr, HAS_LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    at = tl.program_id(0).to(tl.int64) * hidden + column
    added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_LAYER:
        added *= tl.load(layer).to(tl.float32)
    if HAS_MASK:
        added *= tl.load(mask + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, narrow(x + added, out.dtype.element_ty), mask=inside)


@triton.jit
def gated_residual_backward(
    branch, mask, layer, dout, dbranch, dmask_partial, dlayer_partial, rows, hidden,
    HAS_MASK: tl.constexpr, HAS_LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    gate, z = 1.0, 1.0
    if HAS_LAYER:
        gate = tl.load(layer).to(tl.float32)
    if HAS_MASK:
        z = tl.load(mask + column, mask=inside, other=0.0).to(tl.float32)
    dmask = tl.zeros((BLOCK,), dtype=tl.float32)
    dlayer = 0.0
    stride = tl.cast(hidden, tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * stride + column
        d = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        product = d * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_MASK:
            dmask += product * gate
        if HAS_LAYER:
            dlayer += tl.sum(product * z, axis=0)
        tl.store(dbranch + at, narrow(d * gate * z, dbranch.dtype.element_ty), mask=inside)
    if HAS_MASK:
        tl.store(dmask_partial + program.to(tl.int64) * hidden + column, dmask, mask=inside)
    if HAS_LAYER:
        tl.store(dlayer_partial + program, dlayer)


def _fake_forward(residual: Tensor, branch: Tensor, mask: Tensor | None, layer: Tensor | None) -> Tensor:
    return residual.new_empty(residual.shape)


@torch_op(_fake_forward)
def add_gated(residual: Tensor, branch: Tensor, mask: Tensor | None, layer: Tensor | None) -> Tensor:
    out, hidden = residual.new_empty(residual.shape), residual.shape[-1]
    block, warps, _ = block_and_warps(hidden)
    if out.numel():
        with torch.cuda.device_of(out):
            gated_residual_forward[(out.numel() // hidden,)](
                residual.contiguous(), branch.contiguous(), mask, layer, out, hidden,
                HAS_MASK=mask is not None, HAS_LAYER=layer is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return out


def _fake_gradients(
    branch: Tensor, mask: Tensor | None, layer: Tensor | None, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dmask, dlayer = (nothing(dout) if t is None else torch.empty_like(t) for t in (mask, layer))
    return branch.new_empty(branch.shape), dmask, dlayer


@torch_op(_fake_gradients)
def add_gated_gradients(
    branch: Tensor, mask: Tensor | None, layer: Tensor | None, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dbranch, dmask, dlayer."""
    dbranch, dmask, dlayer = _fake_gradients(branch, mask, layer, dout)
    hidden = branch.shape[-1]
    rows = branch.shape[:-1].numel()
    programs = min(rows, BACKWARD_PROGRAMS)
    dmask_partial = None if mask is None else torch.empty(programs, hidden, dtype=torch.float32, device=dout.device)
    dlayer_partial = None if layer is None else torch.empty(programs, dtype=torch.float32, device=dout.device)
    block, _, warps = block_and_warps(hidden)
    if rows:
        with torch.cuda.device_of(branch):
            gated_residual_backward[(programs,)](
                branch.contiguous(), mask, layer, dout.contiguous(), dbranch, dmask_partial, dlayer_partial,
                rows, hidden, HAS_MASK=mask is not None, HAS_LAYER=layer is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    if mask is not None and dmask_partial is not None:
        dmask = dmask_partial.sum(0).where(mask != 0, 0).to(mask.dtype)
    if layer is not None and dlayer_partial is not None:
        dlayer = dlayer_partial.sum().where(layer != 0, 0).to(layer.dtype)
    return dbranch, dmask, dlayer


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, branch: Tensor, mask: Tensor | None, layer: Tensor | None) -> Tensor:
        ctx.save_for_backward(branch, mask, layer)
        out: Tensor = add_gated(residual, branch, mask, layer)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        branch, mask, layer = ctx.saved_tensors
        dbranch, dmask, dlayer = add_gated_gradients(branch, mask, layer, dout)
        return dout, dbranch, None if mask is None else dmask, None if layer is None else dlayer


def gated_residual(
    residual: Tensor, branch: Tensor, hidden_mask: Tensor | None = None, layer_gate: Tensor | None = None
) -> Tensor:
    """``residual + branch * layer_gate * hidden_mask``. residual, branch: [..., hidden] in bf16, fp16 or fp32;
    hidden_mask: [hidden]; layer_gate: 0-d. Returns [..., hidden] in residual's dtype. Without gates, and for rows wider
    than 8192, the definition runs."""
    hidden = residual.shape[-1]
    if branch.shape != residual.shape or (hidden_mask is not None and hidden_mask.shape != (hidden,)):
        raise ValueError(
            f"residual {tuple(residual.shape)}, branch {tuple(branch.shape)}, hidden_mask "
            f"{None if hidden_mask is None else tuple(hidden_mask.shape)} do not fit; use one shape and [hidden]"
        )
    if hidden > WIDEST or (hidden_mask is None and layer_gate is None):
        return reference.gated_residual(residual, branch, hidden_mask, layer_gate)
    mask = None if hidden_mask is None else hidden_mask.contiguous()
    out: Tensor = _GatedResidual.apply(residual, branch, mask, layer_gate)
    return out
