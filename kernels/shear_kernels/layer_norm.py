# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Layer norm over the kept width in Triton.

    n    = (x - mean) / sqrt(variance + eps)      over the entries that the mask keeps; 0 at the others
    out  = (n * weight + bias) * mask
With c and b the sums over tokens of dout * n and of dout, and e = dout * weight * mask:
    dweight = c * mask,   dbias = b * mask,   dmask = c * weight + b * bias       0 where mask is 0
    dx = (e - mean of e - n * mean of e * n) / sqrt(variance + eps)              means over the kept width

One program holds a row in registers, as in norm_kernels.py: 4 bytes an element of 2 forward, 6 backward.
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
def _gates(mask, column, hidden, HAS_MASK: tl.constexpr):
    """Gates of the columns, 0 beyond the row; whether each is kept; and how many are."""
    inside = column < hidden
    z = inside.to(tl.float32)
    if HAS_MASK:
        z = tl.load(mask + column, mask=inside, other=0.0).to(tl.float32)
    return z, z != 0, tl.maximum(tl.sum((z != 0).to(tl.float32), axis=0), 1.0)


@triton.jit
def layer_norm_forward(
    x, weight, bias, mask, out, mean, inverse_deviation,
    hidden, eps,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    z, kept, width = _gates(mask, column, hidden, HAS_MASK)
    v = tl.load(x + row * hidden + column, mask=kept, other=0.0).to(tl.float32)
    m = tl.sum(v, axis=0) / width
    v = tl.where(kept, v - m, 0.0)
    r = tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
    y = v * r * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean + row, m)
    tl.store(inverse_deviation + row, r)
    tl.store(out + row * hidden + column, narrow(y * z, out.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_backward(
    x, weight, mask, mean, inverse_deviation, dout, dx, c_partial, b_partial,
    rows, hidden,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    z, kept, width = _gates(mask, column, hidden, HAS_MASK)
    scale = z * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    c = tl.zeros((BLOCK,), dtype=tl.float32)
    b = tl.zeros((BLOCK,), dtype=tl.float32)
    stride = tl.cast(hidden, tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * stride + column
        d = tl.load(dout + at, mask=kept, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=kept, other=0.0).to(tl.float32)
        r = tl.load(inverse_deviation + row)
        n = tl.where(kept, (v - tl.load(mean + row)) * r, 0.0)
        c += d * n
        if HAS_BIAS:
            b += d
        e = d * scale
        lost = tl.sum(e, axis=0) / width + n * (tl.sum(e * n, axis=0) / width)
        tl.store(dx + at, narrow(tl.where(kept, r * (e - lost), 0.0), dx.dtype.element_ty), mask=inside)
    partial = program.to(tl.int64) * hidden + column
    tl.store(c_partial + partial, c, mask=inside)
    if HAS_BIAS:
        tl.store(b_partial + partial, b, mask=inside)


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@torch_op(_fake_forward)
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, means, inverse standard deviations)."""
    out, mean, inverse_deviation = _fake_forward(x, weight, bias, mask, eps)
    hidden = x.shape[-1]
    block, warps, _ = block_and_warps(hidden)
    if x.numel():
        with torch.cuda.device_of(x):
            layer_norm_forward[(x.numel() // hidden,)](
                x.contiguous(), weight, bias, mask, out, mean, inverse_deviation, hidden, eps,
                HAS_BIAS=bias is not None, HAS_MASK=mask is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return out, mean, inverse_deviation


def _fake_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    mean: Tensor, inverse_deviation: Tensor, dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias, dmask = (nothing(x) if t is None else torch.empty_like(t) for t in (bias, mask))
    return x.new_empty(x.shape), torch.empty_like(weight), dbias, dmask


@torch_op(_fake_gradients)
def layer_norm_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    mean: Tensor, inverse_deviation: Tensor, dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias, dmask."""
    dx, _, dbias, dmask = _fake_gradients(x, weight, bias, mask, mean, inverse_deviation, dout)
    rows, hidden = mean.shape[0], x.shape[-1]
    programs = min(rows, BACKWARD_PROGRAMS)
    c_partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    b_partial = None if bias is None else torch.empty_like(c_partial)
    block, _, warps = block_and_warps(hidden)
    if rows:
        with torch.cuda.device_of(x):
            layer_norm_backward[(programs,)](
                x.contiguous(), weight, mask, mean, inverse_deviation, dout.contiguous(), dx, c_partial, b_partial,
                rows, hidden, HAS_BIAS=bias is not None, HAS_MASK=mask is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    dweight = c = c_partial.sum(0)
    if mask is not None:
        dweight, dmask = c * mask, c * weight
    if bias is not None and b_partial is not None:
        dbias = b = b_partial.sum(0)
        if mask is not None:
            dbias, dmask = b * mask, dmask + b * bias
        dbias = dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias, dmask if mask is None else dmask.where(mask != 0, 0).to(mask.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float) -> Tensor:
        out: Tensor
        out, mean, inverse_deviation = layer_norm(x, weight, bias, mask, eps)
        ctx.save_for_backward(x, weight, bias, mask, mean, inverse_deviation)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing allows no second look
        _, _, bias, mask, _, _ = saved
        dx, dweight, dbias, dmask = layer_norm_gradients(*saved, dout)
        return dx, dweight, None if bias is None else dbias, None if mask is None else dmask, None


def masked_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, hidden_mask: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``(n * weight + bias) * hidden_mask``, n the norm over the kept width, as the module's head says.

    x: [..., hidden] in bf16, fp16 or fp32; weight, bias, hidden_mask: [hidden], any float dtype. Returns [..., hidden]
    in x's dtype; sums and the vectors' gradients in float32. Rows wider than 8192 run the definition.
    """
    hidden = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias), ("hidden_mask", hidden_mask)):
        if vector is not None and vector.shape != (hidden,):
            raise ValueError(f"{name} {tuple(vector.shape)} does not fit hidden={hidden}; use [hidden]")
    if hidden > WIDEST:
        return reference.masked_layer_norm(x, weight, bias, hidden_mask, eps)
    bias, mask = (None if t is None else t.contiguous() for t in (bias, hidden_mask))
    out: Tensor = _LayerNorm.apply(x, weight.contiguous(), bias, mask, eps)
    return out
