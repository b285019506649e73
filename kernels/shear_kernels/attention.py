# mypy: disable-error-code="no-untyped-call"
"""Masked attention in Triton: block sizes, edges, launches and the autograd function.

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

from shear_kernels.attention_backward import attention_delta, attention_keys_backward, attention_queries_backward
from shear_kernels.attention_forward import attention_forward
from shear_kernels.torch_op import nothing, torch_op

WIDEST = 128  # head dimension
DELTA_ROWS = 64  # queries a program of attention_delta takes
DESCRIPTORS = False
"""Whether the forward loads keys and values by tensor-copy descriptors where the device has them (compute capability 9
and more). On sm_90 the loop has a seventh fewer instructions and nothing spills (kernels/bench/aot.csv); no GPU has
run it, so it is off, and the benchmark measures both."""


@dataclass(frozen=True)
class Blocks:
    """Queries (m) and keys (n) a program works on at once, its warps and the depth of its load pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def blocks(kernel: str, head_dim: int, sixteen_bit: bool, arch: int, edges: bool) -> Blocks:
    """The blocks of ``kernel`` ("forward", "keys" or "queries") on compute capability ``arch`` (80, 90, ...).

    Those with the fewest instructions for a pair of query and key that compile without a spill in a loop;
    kernels/bench/aot.csv shows what they compile to. Capabilities of 120 and more have the small shared memory of 86
    and 89, so they get the blocks of 80.
    """
    wide, large, blackwell = head_dim > 64, 90 <= arch < 120, 100 <= arch < 120
    if not sixteen_bit:  # full-precision products run on the ordinary cores: larger tiles spill
        if kernel == "queries" and wide:
            return Blocks(16, 16, 8, 1)
        return Blocks(16, 32, 8 if wide or kernel == "keys" else 4, 1)
    if kernel == "forward":
        if wide and large and not (edges and blackwell):
            return Blocks(128, 128, 8, 2)
        return Blocks(128, 32 if wide and not large else 64, 8, 3)
    if kernel == "keys":
        if wide and blackwell:
            return Blocks(64, 128, 8, 1)
        return Blocks(32, 128 if large or not wide else 64, 8, 2)
    if not wide:
        return Blocks(64, 64, 4, 2)
    return Blocks(128, 64 if large else 32, 8, 2)


def _arch(x: Tensor) -> int:
    """Compute capability times ten; 90 in the interpreter."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def described(x: Tensor) -> bool:
    """Whether descriptors of ``x`` [batch, time, heads, head_dim] are wanted and can be: all steps are 16 bytes."""
    steps = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])]
    return DESCRIPTORS and _arch(x) >= 90 and not any(step % 16 for step in steps)


def _scratch(size: int, _alignment: int, _stream: int | None) -> Tensor:
    """Device memory for a launch's descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _edges(cu_seqlens: Tensor | None, window: int | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """For each token of ``like`` [batch, time, ...], [batch, time] int32, positions in its row: the first key it sees,
    and one past the last query (where causal) or key that it meets in its document."""
    if cu_seqlens is None and window is None:
        return None, None
    batch, time = like.shape[:2]
    position = torch.arange(time, device=like.device).expand(batch, time)
    if cu_seqlens is None:
        starts, ends = torch.zeros_like(position), torch.full_like(position, time)
    else:
        edges = torch.cat((cu_seqlens.long(), cu_seqlens.new_full((1,), batch * time).long()))
        token = torch.arange(batch * time, device=like.device)
        document = torch.bucketize(token, edges[1:-1], right=True)
        row_begin = token // time * time
        starts = (edges[document] - row_begin).clamp(min=0).view(batch, time)
        ends = (edges[document + 1] - row_begin).clamp(max=time).view(batch, time)
    if window is not None:
        starts, ends = starts.maximum(position - (window - 1)), ends.minimum(position + window)
    return starts.int(), ends.int()


def _launchable(x: Tensor) -> Tensor:
    """``x`` as the kernels read it: neighbours adjacent, offsets inside a tile of 128 rows within 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def _flags(q: Tensor, gate: Tensor | None, causal: bool, starts: Tensor | None) -> dict[str, Any]:
    head_dim = q.shape[3]
    return {
        "CAUSAL": causal,
        "HAS_GATE": gate is not None,
        "HAS_EDGES": starts is not None,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }


def _launched(size: Blocks) -> dict[str, int]:
    return {"BLOCK_M": size.m, "BLOCK_N": size.n, "num_warps": size.warps, "num_stages": size.stages}


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, starts: Tensor | None, ends: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, time, dtype=torch.float32)


@torch_op(_fake_forward)
def attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, starts: Tensor | None, ends: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """(out, log2 of the softmax's sums [batch, heads, time] float32)."""
    q, k, v = map(_launchable, (q, k, v))
    batch, time, heads, head_dim = q.shape
    out, log_sum = _fake_forward(q, k, v, gate, starts, ends, causal)
    size = blocks("forward", head_dim, q.element_size() == 2, _arch(q), starts is not None)
    descriptors = described(k) and described(v)
    if descriptors:
        triton.set_allocator(_scratch)
    if q.numel():
        with torch.cuda.device_of(q):
            attention_forward[(triton.cdiv(time, size.m) * batch * heads,)](
                q, k, v, gate, starts, ends, out, log_sum,
                time, heads, heads // k.shape[2], math.log2(math.e) / math.sqrt(head_dim),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                **_flags(q, gate, causal, starts), DESCRIPTORS=descriptors, **_launched(size),
            )  # fmt: skip
    return out, log_sum


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    out: Tensor, log_sum: Tensor, dout: Tensor, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dgate = nothing(log_sum) if gate is None else torch.empty_like(gate)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dgate


@torch_op(_fake_backward)
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    out: Tensor, log_sum: Tensor, dout: Tensor, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dgate."""
    q, k, v, dout = map(_launchable, (q, k, v, dout))
    batch, time, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    choice = (head_dim, q.element_size() == 2, _arch(q), starts is not None)
    dq, dk, dv, dgate = _fake_backward(q, k, v, gate, starts, ends, out, log_sum, dout, causal)
    delta = torch.empty_like(log_sum)
    steps = triton.cdiv(time, DELTA_ROWS)
    partial = q.new_empty(batch, heads, steps, dtype=torch.float32)
    sizes = (time, heads, heads // kv_heads, 1 / math.sqrt(head_dim), math.log2(math.e) / math.sqrt(head_dim))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    flags = _flags(q, gate, causal, starts)
    if q.numel():
        with torch.cuda.device_of(q):
            attention_delta[(steps * batch * heads,)](
                out, dout, gate, delta, partial, time, heads, *dout.stride()[:3],
                HAS_GATE=gate is not None, HEAD_DIM=head_dim, BLOCK_D=flags["BLOCK_D"], BLOCK_M=DELTA_ROWS, num_warps=4,
            )  # fmt: skip
            size = blocks("keys", *choice)
            attention_keys_backward[(triton.cdiv(time, size.n) * batch * kv_heads,)](
                q, k, v, gate, starts, ends, dout, log_sum, delta, dk, dv, *sizes, *strides, **flags, **_launched(size)
            )
            size = blocks("queries", *choice)
            attention_queries_backward[(triton.cdiv(time, size.m) * batch * heads,)](
                q, k, v, gate, starts, ends, dout, log_sum, delta, dq, *sizes, *strides, **flags, **_launched(size)
            )
    return dq, dk, dv, dgate if gate is None else partial.sum((0, 2)).to(gate.dtype)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        starts: Tensor | None,
        ends: Tensor | None,
        causal: bool,
    ) -> Tensor:
        out: Tensor
        out, log_sum = attention(q, k, v, gate, starts, ends, causal)
        ctx.save_for_backward(q, k, v, gate, starts, ends, out, log_sum)
        ctx.causal = causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing allows no second look
        dq, dk, dv, dgate = attention_backward(*saved, dout, ctx.causal)
        return dq, dk, dv, None if saved[3] is None else dgate, None, None, None


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
    window: keys that no query of a block sees are skipped. Returns [batch, time, heads, head_dim] in q's dtype.
    """
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
    out: Tensor = _MaskedAttention.apply(q, k, v, mask, *_edges(cu_seqlens, window, q), causal)
    return out
