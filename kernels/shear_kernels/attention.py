# mypy: disable-error-code="no-untyped-call"
"""Masked attention in Triton: block sizes, launches and the autograd function.

    out = softmax(q k^T / sqrt(head_dim)) v * gate        (formulas of the gradients: attention_backward.py)

FLOPs of an open head over T queries and keys: 4 T^2 head_dim forward, 10 T^2 head_dim backward (14 here, for dq and dk
each compute the scores again), half of it when causal. Bytes: q, k, v and out once each way, plus k and v once for
every block of queries, which the second-level cache mostly serves.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from shear_kernels import reference
from shear_kernels.attention_backward import attention_delta, attention_keys_backward, attention_queries_backward
from shear_kernels.attention_forward import attention_forward

WIDEST = 128  # head dimension
DELTA_ROWS = 64  # queries a program of attention_delta takes


@dataclass(frozen=True)
class Blocks:
    """Queries (m) and keys (n) a program works on at once, its warps and the depth of its load pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def blocks(kernel: str, head_dim: int, sixteen_bit: bool, arch: int, documents: bool) -> Blocks:
    """The blocks of ``kernel`` ("forward", "keys" or "queries") on compute capability ``arch`` (80, 90, ...).

    The largest that compile without a spill; kernels/bench/aot.csv shows what they compile to. Capabilities of 120 and
    more have the small shared memory of 86 and 89, so they get the blocks of 80.
    """
    wide, large = head_dim > 64, 90 <= arch < 120
    if not sixteen_bit:  # full-precision products run on the ordinary cores: larger tiles spill
        if kernel == "queries" and wide:
            return Blocks(16, 16, 8, 1)
        return Blocks(16, 32, 8 if wide or kernel == "keys" else 4, 1)
    if kernel == "forward":
        return Blocks(128, 32 if wide and documents and not large else 64, 8, 3)
    if kernel == "keys":
        if not wide:
            return Blocks(32, 128, 8, 2)
        return Blocks(64, 64, 8, 1) if large and arch >= 100 else Blocks(32, 64, 8, 2)
    if not wide:
        return Blocks(64, 64, 4, 2)
    return Blocks(128, 64 if large else 32, 8, 2)


def _arch(x: Tensor) -> int:
    """Compute capability times ten; 90 in the interpreter."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _documents(cu_seqlens: Tensor, batch: int, time: int) -> tuple[Tensor, Tensor]:
    """For each token, [batch, time] int32: first position in its row of its document, and one past the last."""
    total = batch * time
    edges = torch.cat((cu_seqlens.long(), cu_seqlens.new_full((1,), total).long()))
    token = torch.arange(total, device=cu_seqlens.device)
    document = torch.bucketize(token, edges[1:-1], right=True)
    row_begin = token // time * time
    starts = (edges[document] - row_begin).clamp(min=0)
    ends = (edges[document + 1] - row_begin).clamp(max=time)
    return starts.int().view(batch, time), ends.int().view(batch, time)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, causal: bool, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        batch, time, heads, head_dim = q.shape
        starts, ends = (None, None) if cu_seqlens is None else _documents(cu_seqlens, batch, time)
        out = q.new_empty(q.shape)
        log_sum = torch.empty(batch, heads, time, dtype=torch.float32, device=q.device)
        size = blocks("forward", head_dim, q.element_size() == 2, _arch(q), cu_seqlens is not None)
        flags = {
            "CAUSAL": causal,
            "HAS_GATE": gate is not None,
            "HAS_DOCUMENTS": cu_seqlens is not None,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        }
        if q.numel():
            with torch.cuda.device_of(q):
                attention_forward[(triton.cdiv(time, size.m), batch * heads)](
                    q, k, v, gate, starts, ends, out, log_sum,
                    time, heads, heads // k.shape[2], math.log2(math.e) / math.sqrt(head_dim),
                    *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                    **flags, BLOCK_M=size.m, BLOCK_N=size.n, num_warps=size.warps, num_stages=size.stages,
                )  # fmt: skip
        ctx.save_for_backward(q, k, v, gate, starts, ends, out, log_sum)
        ctx.flags = flags
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate, starts, ends, out, log_sum = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        batch, time, heads, head_dim = q.shape
        kv_heads = k.shape[2]
        choice = (head_dim, q.element_size() == 2, _arch(q), ctx.flags["HAS_DOCUMENTS"])
        dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(log_sum)
        steps = triton.cdiv(time, DELTA_ROWS)
        partial = torch.zeros(batch, heads, steps, dtype=torch.float32, device=q.device)
        sizes = (time, heads, heads // kv_heads, 1 / math.sqrt(head_dim), math.log2(math.e) / math.sqrt(head_dim))
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
        if q.numel():
            with torch.cuda.device_of(q):
                attention_delta[(steps, batch * heads)](
                    out, dout, gate, delta, partial, time, heads, *dout.stride()[:3],
                    HAS_GATE=gate is not None, HEAD_DIM=head_dim, BLOCK_D=ctx.flags["BLOCK_D"], BLOCK_M=DELTA_ROWS,
                    num_warps=4,
                )  # fmt: skip
                size = blocks("keys", *choice)
                attention_keys_backward[(triton.cdiv(time, size.n), batch * kv_heads)](
                    q, k, v, gate, starts, ends, dout, log_sum, delta, dk, dv, *sizes, *strides,
                    **ctx.flags, BLOCK_M=size.m, BLOCK_N=size.n, num_warps=size.warps, num_stages=size.stages,
                )  # fmt: skip
                size = blocks("queries", *choice)
                attention_queries_backward[(triton.cdiv(time, size.m), batch * heads)](
                    q, k, v, gate, starts, ends, dout, log_sum, delta, dq, *sizes, *strides,
                    **ctx.flags, BLOCK_M=size.m, BLOCK_N=size.n, num_warps=size.warps, num_stages=size.stages,
                )  # fmt: skip
        dgate = None if gate is None else partial.sum((0, 2)).to(gate.dtype)
        return dq, dk, dv, dgate, None, None


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_mask: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v * head_mask``, softmax and sums in float32.

    q: [batch, time, heads, head_dim]; k, v: [batch, time, kv_heads, head_dim] in bf16, fp16 or fp32, strides over
    batch, time and heads free; head_dim up to 128. head_mask: [heads], 0 to 1, any float dtype; a head whose gate is
    exactly 0 costs a write of zeros, and gets zero gradients. cu_seqlens: [documents + 1] int32, as in the reference.
    A window runs the definition. Returns [batch, time, heads, head_dim] in q's dtype.
    """
    if window is not None:
        return reference.masked_attention(q, k, v, head_mask, causal, cu_seqlens, window)
    batch, time, heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (batch, time) or k.shape[3] != head_dim or heads % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; use [batch, time, heads, head_dim]"
            " and twice [batch, time, kv_heads, head_dim] with heads a multiple of kv_heads"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype} differ; use one dtype")
    if head_dim > WIDEST:
        raise ValueError(f"head_dim={head_dim} is wider than a program holds; up to {WIDEST}, or backend='reference'")
    if head_mask is not None and head_mask.shape != (heads,):
        raise ValueError(f"head_mask {tuple(head_mask.shape)} does not fit heads={heads}; use [heads]")
    mask = None if head_mask is None else head_mask.contiguous()
    out: Tensor = _MaskedAttention.apply(q, k, v, mask, causal, cu_seqlens)
    return out
