# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Masked attention, forward kernel, and the parts the backward kernels share.

One program owns BLOCK_M queries of one head and walks over that head's keys with an online softmax (FlashAttention-2,
arXiv 2307.08691, algorithm 1; base-2 exponentials). The head's gate multiplies the accumulator on its way out. Where
the gate is exactly 0 the program writes zeros and exits before it has read a query.
"""

import triton
import triton.language as tl

from shear_kernels.precision import dot, narrow


@triton.jit
def load_rows(base, row, rows, stride, CHECK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[len(row), BLOCK_D] elements of rows ``row``; zero beyond HEAD_DIM, and beyond ``rows`` if CHECK."""
    element = tl.arange(0, BLOCK_D)
    at = base + row[:, None] * stride + element[None, :]
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(at, mask=row[:, None] < rows, other=0.0) if CHECK else tl.load(at)
    elif CHECK:
        tile = tl.load(at, mask=(row[:, None] < rows) & (element[None, :] < HEAD_DIM), other=0.0)
    else:
        tile = tl.load(at, mask=element[None, :] < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def store_rows(base, row, rows, stride, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    element = tl.arange(0, BLOCK_D)
    inside = (row[:, None] < rows) & (element[None, :] < HEAD_DIM)
    tl.store(base + row[:, None] * stride + element[None, :], narrow(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def keys_of_queries(
    first, time, starts, ends, row,
    CAUSAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key range of a block of queries: [low, middle) needs no mask, [middle, high) does; and each query's document."""
    low, high, row_start, row_end = 0, time, row * 0, row * 0 + time
    if CAUSAL:
        high = tl.minimum(first + BLOCK_M, time)
        middle = (first // BLOCK_N) * BLOCK_N
    else:
        middle = (time // BLOCK_N) * BLOCK_N
    if HAS_DOCUMENTS:
        row_start = tl.load(starts + row, mask=row < time, other=0)
        row_end = tl.load(ends + row, mask=row < time, other=0)
        low = (tl.load(starts + first) // BLOCK_N) * BLOCK_N
        if not CAUSAL:
            high = tl.load(ends + tl.minimum(first + BLOCK_M, time) - 1)
        middle = low
    return low, middle, high, row_start, row_end


@triton.jit
def allowed_pairs(row, column, time, row_start, row_end, CAUSAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """Which queries ``row`` [M, 1] may see which keys ``column`` [1, N]."""
    allowed = column < time
    if CAUSAL:
        allowed = allowed & (column <= row)
    if HAS_DOCUMENTS:
        allowed = allowed & (column >= row_start)
        if not CAUSAL:
            allowed = allowed & (column < row_end)
    return allowed


@triton.jit
def _forward_steps(
    acc, top, total, q_tile, k, v, low, high, row, row_start, row_end, time, k_stride, v_stride, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, column, time, k_stride, MASKED, HEAD_DIM, BLOCK_D)
        score = dot(q_tile, tl.trans(k_tile)) * scale_log2  # [M, N]
        if MASKED:
            allowed = allowed_pairs(
                row[:, None], column[None, :], time, row_start[:, None], row_end[:, None], CAUSAL, HAS_DOCUMENTS
            )
            score = tl.where(allowed, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        origin = new_top
        if HAS_DOCUMENTS:  # a query may see no key of this block, nor of those before
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score - origin[:, None])
        shrink = tl.exp2(top - origin)
        total = total * shrink + tl.sum(p, axis=1)
        v_tile = load_rows(v, column, time, v_stride, MASKED, HEAD_DIM, BLOCK_D)
        acc = acc * shrink[:, None] + dot(narrow(p, v_tile.dtype), v_tile)
        top = new_top
    return acc, top, total


@triton.jit
def attention_forward(
    q, k, v, gate, starts, ends, out, log_sum,
    time, heads, group, scale_log2,
    q_stride_batch, q_stride_time, q_stride_head, k_stride_batch, k_stride_time, k_stride_head,
    v_stride_batch, v_stride_time, v_stride_head,
    CAUSAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # late queries see most keys: start them first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    row = first + tl.arange(0, BLOCK_M)
    out += batch * time * heads * HEAD_DIM + head * HEAD_DIM
    if HAS_GATE:
        g = tl.load(gate + head).to(tl.float32)
        if g == 0:
            store_rows(out, row, time, heads * HEAD_DIM, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), HEAD_DIM, BLOCK_D)
            return
    q += batch * q_stride_batch + head * q_stride_head
    k += batch * k_stride_batch + (head // group) * k_stride_head
    v += batch * v_stride_batch + (head // group) * v_stride_head
    if HAS_DOCUMENTS:
        starts += batch * time
        ends += batch * time
    low, middle, high, row_start, row_end = keys_of_queries(
        first, time, starts, ends, row, CAUSAL, HAS_DOCUMENTS, BLOCK_M, BLOCK_N
    )

    q_tile = load_rows(q, row, time, q_stride_time, True, HEAD_DIM, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if not HAS_DOCUMENTS:
        acc, top, total = _forward_steps(
            acc, top, total, q_tile, k, v, low, middle, row, row_start, row_end, time, k_stride_time, v_stride_time,
            scale_log2, False, CAUSAL, HAS_DOCUMENTS, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc, top, total = _forward_steps(
        acc, top, total, q_tile, k, v, middle, high, row, row_start, row_end, time, k_stride_time, v_stride_time,
        scale_log2, True, CAUSAL, HAS_DOCUMENTS, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc = acc / total[:, None]
    if HAS_GATE:
        acc *= g
    store_rows(out, row, time, heads * HEAD_DIM, acc, HEAD_DIM, BLOCK_D)
    tl.store(log_sum + (batch * heads + head) * time + row, top + tl.log2(total), mask=row < time)
