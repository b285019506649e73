# mypy: disable-error-code="no-untyped-call"
"""RMS norm over the kept width, alone or with the gated residual addition before it: launches and autograd.

Formulas and traffic are in norm_kernels.py. Of the rows' statistics one number a row is kept for the backward.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from shear_kernels import reference
from shear_kernels.norm_kernels import add_rms_norm_backward, add_rms_norm_forward
from shear_kernels.torch_op import nothing, torch_op

WIDEST = 8192  # a row must fit the registers of one program: at 16384 the backward spills 1,200 times (sm_90)
BACKWARD_PROGRAMS = 528  # four for each multiprocessor of an H100; each sums its rows' c in registers


def block_and_warps(hidden: int) -> tuple[int, int, int]:
    """Columns a program holds (a power of two), warps forward and backward: 16 elements a thread, at 8192 forward 8."""
    block = max(256, triton.next_power_of_2(hidden))
    warps = max(1, block // 512)
    return block, 32 if block > 4096 else warps, warps


def _forward(
    residual: Tensor, branch: Tensor | None, weight: Tensor, mask: Tensor | None, layer: Tensor | None, eps: float,
    stream: Tensor, normed: Tensor, inverse_rms: Tensor,
) -> None:  # fmt: skip
    hidden = residual.shape[-1]
    block, warps, _ = block_and_warps(hidden)
    if residual.numel():
        with torch.cuda.device_of(residual):
            add_rms_norm_forward[(residual.numel() // hidden,)](
                residual, branch, weight, mask, layer, stream, normed, inverse_rms, hidden, eps,
                HAS_BRANCH=branch is not None, HAS_MASK=mask is not None, HAS_LAYER=layer is not None,
                BLOCK=block, num_warps=warps,
            )  # fmt: skip


def _statistic(x: Tensor) -> Tensor:
    """[rows] float32, not filled."""
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _fake_norm(x: Tensor, weight: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _statistic(x)


@torch_op(_fake_norm)
def rms_norm(x: Tensor, weight: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, inverse root mean squares)."""
    x = x.contiguous()
    normed, inverse_rms = x.new_empty(x.shape), _statistic(x)
    _forward(x, None, weight, mask, None, eps, x, normed, inverse_rms)
    return normed, inverse_rms


def _fake_add_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, mask: Tensor | None, layer: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape), _statistic(residual)


@torch_op(_fake_add_norm)
def residual_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, mask: Tensor | None, layer: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(stream, normed, inverse root mean squares)."""
    stream, normed, inverse_rms = _fake_add_norm(residual, branch, weight, mask, layer, eps)
    _forward(residual.contiguous(), branch.contiguous(), weight, mask, layer, eps, stream, normed, inverse_rms)
    return stream, normed, inverse_rms


def _fake_gradients(
    stream: Tensor, branch: Tensor | None, weight: Tensor, mask: Tensor | None, layer: Tensor | None,
    inverse_rms: Tensor, dnormed: Tensor, dstream: Tensor | None, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        stream.new_empty(stream.shape),
        nothing(stream) if branch_dtype is None else stream.new_empty(stream.shape, dtype=branch_dtype),
        torch.empty_like(weight),
        nothing(stream) if mask is None else torch.empty_like(mask),
        nothing(stream) if layer is None else torch.empty_like(layer),
    )


@torch_op(_fake_gradients)
def rms_norm_gradients(
    stream: Tensor, branch: Tensor | None, weight: Tensor, mask: Tensor | None, layer: Tensor | None,
    inverse_rms: Tensor, dnormed: Tensor, dstream: Tensor | None, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dresidual, dbranch, dweight, dmask, dlayer. ``branch_dtype``: None where nothing was added; ``branch`` is needed
    for the gates' gradients only."""
    stream = stream.contiguous()
    rows, hidden, has_branch = inverse_rms.shape[0], stream.shape[-1], branch_dtype is not None
    dresidual, dbranch, _, dmask, dlayer = _fake_gradients(
        stream, branch, weight, mask, layer, inverse_rms, dnormed, dstream, branch_dtype
    )
    programs = min(rows, BACKWARD_PROGRAMS)

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        """A place for each program's sums, all of which are written; without rows there are none, and no sum."""
        return torch.empty(shape, dtype=torch.float32, device=stream.device) if wanted else None

    c_partial = sums(True, programs, hidden)
    dmask_partial = sums(has_branch and mask is not None, programs, hidden)
    dlayer_partial = sums(has_branch and layer is not None, programs)
    block, _, warps = block_and_warps(hidden)
    if rows:
        with torch.cuda.device_of(stream):
            add_rms_norm_backward[(programs,)](
                stream, None if branch is None else branch.contiguous(), weight, mask, layer, inverse_rms,
                dnormed.contiguous(), None if dstream is None else dstream.contiguous(), dresidual,
                dbranch if has_branch else None, c_partial, dmask_partial, dlayer_partial, rows, hidden,
                HAS_BRANCH=has_branch, HAS_MASK=mask is not None, HAS_LAYER=layer is not None,
                BLOCK=block, RELOAD=block > 4096, num_warps=warps,
            )  # fmt: skip
    assert c_partial is not None
    dweight = c = c_partial.sum(0)
    if mask is not None:
        dweight, dmask = c * mask, c * weight
        if dmask_partial is not None:
            dmask += dmask_partial.sum(0)
        dmask = dmask.where(mask != 0, 0).to(mask.dtype)
    if dlayer_partial is not None and layer is not None:
        dlayer = dlayer_partial.sum().where(layer != 0, 0).to(layer.dtype)
    return dresidual, dbranch, dweight.to(weight.dtype), dmask, dlayer


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor | None, eps: float) -> Tensor:
        normed: Tensor
        normed, inverse_rms = rms_norm(x, weight, mask, eps)
        ctx.save_for_backward(x, weight, mask, inverse_rms)
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, inverse_rms = ctx.saved_tensors
        dx, _, dweight, dmask, _ = rms_norm_gradients(x, None, weight, mask, None, inverse_rms, dnormed, None, None)
        return dx, dweight, None if mask is None else dmask, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        layer: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        stream, normed, inverse_rms = residual_rms_norm(residual, branch, weight, mask, layer, eps)
        gated = mask is not None or layer is not None
        ctx.save_for_backward(stream, branch if gated else None, weight, mask, layer, inverse_rms)
        ctx.branch_dtype = branch.dtype
        return stream, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dstream: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        stream, branch, weight, mask, layer, inverse_rms = ctx.saved_tensors
        dresidual, dbranch, dweight, dmask, dlayer = rms_norm_gradients(
            stream, branch, weight, mask, layer, inverse_rms, dnormed, dstream, ctx.branch_dtype
        )
        return dresidual, dbranch, dweight, None if mask is None else dmask, None if layer is None else dlayer, None


def _check(residual: Tensor, branch: Tensor | None, weight: Tensor, mask: Tensor | None) -> None:
    hidden = residual.shape[-1]
    if weight.shape != (hidden,) or (mask is not None and mask.shape != (hidden,)):
        raise ValueError(
            f"weight {tuple(weight.shape)}, mask {None if mask is None else tuple(mask.shape)} do not fit "
            f"hidden={hidden}; use [hidden]"
        )
    if branch is not None and branch.shape != residual.shape:
        raise ValueError(f"branch {tuple(branch.shape)} differs from residual {tuple(residual.shape)}; use one shape")


def masked_rms_norm(x: Tensor, weight: Tensor, hidden_mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``x / sqrt(sum(x^2) / width + eps) * weight * hidden_mask``, as the module's head says without a branch.

    x: [..., hidden] in bf16, fp16 or fp32, zero where hidden_mask is; weight, hidden_mask: [hidden], any float dtype.
    Returns [..., hidden] in x's dtype; sums, dweight and dmask in float32. Rows wider than 8192 run the definition.
    """
    if x.shape[-1] > WIDEST:
        return reference.masked_rms_norm(x, weight, hidden_mask, eps)
    _check(x, None, weight, hidden_mask)
    mask = None if hidden_mask is None else hidden_mask.contiguous()
    normed: Tensor = _RmsNorm.apply(x, weight.contiguous(), mask, eps)
    return normed


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    hidden_mask: Tensor | None = None,
    layer_gate: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(``residual + branch * layer_gate * hidden_mask``, its masked RMS norm), in one pass.

    residual, branch: [..., hidden]; weight, hidden_mask: [hidden]; layer_gate: 0-d. Both results are [..., hidden] in
    residual's dtype. Rows wider than 8192 run the definition.
    """
    if residual.shape[-1] > WIDEST:
        return reference.add_rms_norm(residual, branch, weight, hidden_mask, layer_gate, eps)
    _check(residual, branch, weight, hidden_mask)
    mask = None if hidden_mask is None else hidden_mask.contiguous()
    stream, normed = _AddRmsNorm.apply(residual, branch, weight.contiguous(), mask, layer_gate, eps)
    return stream, normed
