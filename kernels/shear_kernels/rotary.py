# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Rotary position embedding of q and k in one launch, forward and backward.

    out[first]  = x[first] * cos - x[second] * sin
    out[second] = x[second] * cos + x[first] * sin        (first, second: halves of what turns; the rest pass)

The gradient is the rotation by the opposite angle. One program turns all heads of one token, so cos and sin are read
once a token and not once a head. Bytes moved per element of 2 bytes: 4 either way; PyTorch's products, sums
and concatenation each read and write on their own, several times that: so the model gains from it. cos and sin are
constants: they get no gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels.precision import narrow
from shear_kernels.torch_op import torch_op


def block_and_warps(heads: int, head_dim: int) -> tuple[int, int, int]:
    """Heads and half head dimension a program holds (powers of two), and warps: up to 16 elements a thread and half."""
    block_heads, half = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim // 2)
    return block_heads, half, min(16, max(1, block_heads * half // 512))


@triton.jit
def _turn(
    x, out, c, s, x_stride_head, heads,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    element = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < heads) & (element < HALF)
    first = tl.load(x + head * x_stride_head + element, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + head * x_stride_head + element + HALF, mask=inside, other=0.0).to(tl.float32)
    at = out + head * HEAD_DIM + element
    tl.store(at, narrow(first * c - second * s, out.dtype.element_ty), mask=inside)
    tl.store(at + HALF, narrow(second * c + first * s, out.dtype.element_ty), mask=inside)
    if 2 * HALF < HEAD_DIM:  # entries that do not turn
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        inside = (head < heads) & (rest < HEAD_DIM)
        passed = tl.load(x + head * x_stride_head + rest, mask=inside, other=0.0)
        tl.store(out + head * HEAD_DIM + rest, passed, mask=inside)


@triton.jit
def rope_kernel(
    q, k, cos, sin, q_out, k_out,
    time, heads, kv_heads, q_stride_batch, q_stride_time, q_stride_head, k_stride_batch, k_stride_time, k_stride_head,
    angle_stride_batch,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    t, batch = token % time, token // time
    element = tl.arange(0, BLOCK_HALF)
    angle = batch * angle_stride_batch + t * HALF + element
    c = tl.load(cos + angle, mask=element < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=element < HALF, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        s = -s
    q += batch * q_stride_batch + t * q_stride_time
    k += batch * k_stride_batch + t * k_stride_time
    q_out += token * heads * HEAD_DIM
    k_out += token * kv_heads * HEAD_DIM
    _turn(q, q_out, c, s, q_stride_head, heads, HALF, HEAD_DIM, BLOCK_HALF, BLOCK_REST, BLOCK_HEADS)
    _turn(k, k_out, c, s, k_stride_head, kv_heads, HALF, HEAD_DIM, BLOCK_HALF, BLOCK_REST, BLOCK_KV_HEADS)


def _fake_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch_op(_fake_rotate)
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, time, heads, head_dim = q.shape
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    half = cos.shape[-1]
    block_heads, block_half, warps = block_and_warps(heads, 2 * half)
    if q.numel():
        with torch.cuda.device_of(q):
            rope_kernel[(batch * time,)](
                q, k, cos, sin, q_out, k_out,
                time, heads, k.shape[2], *q.stride()[:3], *k.stride()[:3], cos.stride(0) if cos.dim() == 3 else 0,
                BACKWARD=backward, HALF=half, HEAD_DIM=head_dim, BLOCK_HALF=block_half,
                BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)), BLOCK_HEADS=block_heads,
                BLOCK_KV_HEADS=triton.next_power_of_2(k.shape[2]), num_warps=warps,
            )  # fmt: skip
    return q_out, k_out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q_out, k_out = rotate(q, k, cos, sin, False)
        return q_out, k_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *rotate(dq, dk, cos, sin, True), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q: [batch, time, heads, head_dim] and k: [batch, time, kv_heads, head_dim] by the angles of their tokens.

    cos, sin: [time, rotary / 2], or [batch, time, rotary / 2] where positions differ by row; the entries of a head
    beyond ``rotary`` pass as they are. Strides over batch, time and heads are free. Returns (q, k) rotated, contiguous,
    in their own dtypes; arithmetic in float32.
    """
    batch, time, _, head_dim = q.shape
    half = cos.shape[-1]
    if 2 * half > head_dim or k.shape[:2] != (batch, time) or k.shape[3] != head_dim:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and {half} angles do not fit; use [batch, time, heads, head_dim] "
            "and at most head_dim / 2 angles"
        )
    if cos.shape not in ((time, half), (batch, time, half)) or sin.shape != cos.shape:
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit; use {(time, half)} or {(batch, time, half)}"
        )
    q_out, k_out = _Rope.apply(q, k, cos.contiguous(), sin.contiguous())
    return q_out, k_out
