# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Masked attention, forward kernel, and the parts the backward kernels share.

One program owns BLOCK_M queries of one head and walks over that head's keys with an online softmax (FlashAttention-2,
arXiv 2307.08691, algorithm 1; base-2 exponentials). The head's gate multiplies the accumulator on its way out. Where
the gate is exactly 0 the program writes zeros and exits before it has read a query.

Documents and windows are edges: two numbers for each position, the first key it sees as a query and one past the last
query (where causal) or key that it meets. Keys that no query of the block sees are skipped, those that all see need no
mask. A block's first row joins the base pointer in 64 bits; offsets inside a tile have 32.
"""

import triton
import triton.language as tl

from shear_kernels.precision import dot, narrow


@triton.jit
def load_rows(base, first, rows, stride, CHECK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """[BLOCK, BLOCK_D] elements from row ``first`` on; zero beyond HEAD_DIM, and beyond ``rows`` if CHECK."""
    row, element = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = base + tl.cast(first, tl.int64) * stride + row * stride + element
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(at, mask=row < rows - first, other=0.0) if CHECK else tl.load(at)
    elif CHECK:
        tile = tl.load(at, mask=(row < rows - first) & (element < HEAD_DIM), other=0.0)
    else:
        tile = tl.load(at, mask=element < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def load_keys(source, first, rows, stride, CHECK: tl.constexpr, DESCRIPTORS: tl.constexpr, HEAD_DIM: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``load_rows`` of a pointer, or of a descriptor, whose copies write zeros where there is nothing."""
    if DESCRIPTORS:
        tile = source.load([first, 0])
    else:
        tile = load_rows(source, first, rows, stride, CHECK, HEAD_DIM, BLOCK_D, BLOCK)
    return tile


@triton.jit
def store_rows(base, first, rows, stride, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    row, element = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = base + tl.cast(first, tl.int64) * stride + row * stride + element
    tl.store(at, narrow(tile, base.dtype.element_ty), mask=(row < rows - first) & (element < HEAD_DIM))


@triton.jit
def block_and_head(blocks, heads):
    """This program's block, batch row (64 bits) and head; one axis of programs, since CUDA's others end at 65,535."""
    batch_head = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, (batch_head // heads).to(tl.int64), batch_head % heads


@triton.jit
def keys_of_queries(
    first, time, starts, ends, row,
    CAUSAL: tl.constexpr, HAS_EDGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key range of a block of queries: [low, left) and [right, high) need a mask, [left, right) does not; then each
    query's own edges."""
    low, left, high, row_start, row_end = 0, 0, time, row * 0, row * 0 + time
    if CAUSAL:
        high = tl.minimum(first + BLOCK_M, time)
        right = (first // BLOCK_N) * BLOCK_N
    else:
        right = (time // BLOCK_N) * BLOCK_N
    if HAS_EDGES:  # edges never fall from one row to the next
        row_start = tl.load(starts + row, mask=row < time, other=0)
        row_end = tl.load(ends + row, mask=row < time, other=0)
        last = tl.minimum(first + BLOCK_M, time) - 1
        low = (tl.load(starts + first) // BLOCK_N) * BLOCK_N
        left = tl.cdiv(tl.load(starts + last), BLOCK_N) * BLOCK_N
        if not CAUSAL:
            high = tl.load(ends + last)
            right = (tl.load(ends + first) // BLOCK_N) * BLOCK_N
        right = tl.maximum(low, right)
        left = tl.minimum(left, right)
    return low, left, right, high, row_start, row_end


@triton.jit
def allowed_pairs(row, column, time, row_start, row_end, CAUSAL: tl.constexpr, HAS_EDGES: tl.constexpr):
    """Which queries ``row`` [M, 1] may see which keys ``column`` [1, N]."""
    allowed = column < time
    if CAUSAL:
        allowed = allowed & (column <= row)
    if HAS_EDGES:
        allowed = allowed & (column >= row_start)
        if not CAUSAL:
            allowed = allowed & (column < row_end)
    return allowed


@triton.jit
def _forward_steps(
    acc, top, total, q_tile, k, v, low, high, row, row_start, row_end, time, k_stride, v_stride, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_EDGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        k_tile = load_keys(k, start, time, k_stride, MASKED, DESCRIPTORS, HEAD_DIM, BLOCK_D, BLOCK_N)
        score = dot(q_tile, tl.trans(k_tile))  # [M, N], unscaled: the scale is part of the exponent's multiply-add
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            allowed = allowed_pairs(
                row[:, None], column[None, :], time, row_start[:, None], row_end[:, None], CAUSAL, HAS_EDGES
            )
            score = tl.where(allowed, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1) * scale_log2)
        origin = new_top
        if HAS_EDGES:  # a query may see no key of this block, nor of those before
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score * scale_log2 - origin[:, None])
        shrink = tl.exp2(top - origin)
        total = total * shrink + tl.sum(p, axis=1)
        v_tile = load_keys(v, start, time, v_stride, MASKED, DESCRIPTORS, HEAD_DIM, BLOCK_D, BLOCK_N)
        acc = acc * shrink[:, None] + dot(narrow(p, v_tile.dtype), v_tile)
        top = new_top
    return acc, top, total


@triton.jit
def attention_forward(
    q, k, v, gate, starts, ends, out, log_sum,
    time, heads, group, scale_log2,
    q_stride_batch, q_stride_time, q_stride_head, k_stride_batch, k_stride_time, k_stride_head,
    v_stride_batch, v_stride_time, v_stride_head,
    CAUSAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_EDGES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(time, BLOCK_M)
    block, batch, head = block_and_head(blocks, heads)
    first = (blocks - 1 - block) * BLOCK_M  # late queries see most keys: start them first
    row = first + tl.arange(0, BLOCK_M)
    out += batch * time * heads * HEAD_DIM + head * HEAD_DIM
    if HAS_GATE:
        g = tl.load(gate + head).to(tl.float32)
        if g == 0:
            zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            store_rows(out, first, time, heads * HEAD_DIM, zeros, HEAD_DIM, BLOCK_D, BLOCK_M)
            return
    q += batch * q_stride_batch + head * q_stride_head
    k += batch * k_stride_batch + (head // group) * k_stride_head
    v += batch * v_stride_batch + (head // group) * v_stride_head
    if DESCRIPTORS:
        k = tl.make_tensor_descriptor(k, [time, HEAD_DIM], [k_stride_time, 1], [BLOCK_N, BLOCK_D])
        v = tl.make_tensor_descriptor(v, [time, HEAD_DIM], [v_stride_time, 1], [BLOCK_N, BLOCK_D])
    if HAS_EDGES:
        starts += batch * time
        ends += batch * time
    low, left, right, high, row_start, row_end = keys_of_queries(
        first, time, starts, ends, row, CAUSAL, HAS_EDGES, BLOCK_M, BLOCK_N
    )

    q_tile = load_rows(q, first, time, q_stride_time, True, HEAD_DIM, BLOCK_D, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_EDGES:
        acc, top, total = _forward_steps(
            acc, top, total, q_tile, k, v, low, left, row, row_start, row_end, time, k_stride_time, v_stride_time,
            scale_log2, True, CAUSAL, HAS_EDGES, DESCRIPTORS, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc, top, total = _forward_steps(
        acc, top, total, q_tile, k, v, left, right, row, row_start, row_end, time, k_stride_time, v_stride_time,
        scale_log2, False, CAUSAL, HAS_EDGES, DESCRIPTORS, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, top, total = _forward_steps(
        acc, top, total, q_tile, k, v, right, high, row, row_start, row_end, time, k_stride_time, v_stride_time,
        scale_log2, True, CAUSAL, HAS_EDGES, DESCRIPTORS, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc = acc / total[:, None]
    if HAS_GATE:
        acc *= g
    store_rows(out, first, time, heads * HEAD_DIM, acc, HEAD_DIM, BLOCK_D, BLOCK_M)
    tl.store(log_sum + (batch * heads + head) * time + row, top + tl.log2(total), mask=row < time)
