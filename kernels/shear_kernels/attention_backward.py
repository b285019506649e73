# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Masked attention, backward kernels: delta, then dk and dv, then dq. No atomics: the result is the same every time.

With P the softmax, U = P V the ungated output, out = g U and dO the upstream gradient:
    delta = rowsum(dO * U) = rowsum(dO * out) / g,    dgate = sum of delta,
    dV = (g P)^T dO,    dS = g P * (dO V^T - delta),    dQ = scale dS K,    dK = scale dS^T Q.
g P costs nothing more than P: exp2(score - (log_sum - log2 g)). A head whose gate is exactly 0 is skipped in all three.
"""

import triton
import triton.language as tl

from shear_kernels.attention_forward import allowed_pairs, block_and_head, keys_of_queries, load_rows, store_rows
from shear_kernels.precision import dot, narrow


@triton.jit
def attention_delta(
    out, dout, gate, delta, dgate_partial,
    time, heads, dout_stride_batch, dout_stride_time, dout_stride_head,
    HAS_GATE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(time, BLOCK_M)
    block, batch, head = block_and_head(blocks, heads)
    first = block * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    partial = dgate_partial + (batch * heads + head) * blocks + block
    g = 1.0
    if HAS_GATE:
        g = tl.load(gate + head).to(tl.float32)
        if g == 0:
            tl.store(partial, 0.0)
            return
    out += batch * time * heads * HEAD_DIM + head * HEAD_DIM
    dout += batch * dout_stride_batch + head * dout_stride_head
    o = load_rows(out, first, time, heads * HEAD_DIM, True, HEAD_DIM, BLOCK_D, BLOCK_M).to(tl.float32)
    do = load_rows(dout, first, time, dout_stride_time, True, HEAD_DIM, BLOCK_D, BLOCK_M).to(tl.float32)
    value = tl.sum(o * do, axis=1) / g
    tl.store(delta + (batch * heads + head) * time + row, value, mask=row < time)
    if HAS_GATE:
        tl.store(partial, tl.sum(value, axis=0))


@triton.jit
def _key_steps(
    dk, dv, k_tile, v_tile, q, dout, log_sum, delta, log2_gate, low, high, column, key_start, key_end, time,
    q_stride, dout_stride, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_EDGES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)  # queries beyond time load as zeros and add zeros
        q_tile = load_rows(q, start, time, q_stride, True, HEAD_DIM, BLOCK_D, BLOCK_M)
        score = dot(k_tile, tl.trans(q_tile)) * scale_log2  # [N, M]
        bound = tl.load(log_sum + row, mask=row < time, other=0.0) - log2_gate
        p = tl.exp2(score - bound[None, :])
        if MASKED:
            allowed = row[None, :] < time
            if CAUSAL:
                allowed = allowed & (row[None, :] >= column[:, None])
            if HAS_EDGES:
                allowed = allowed & (row[None, :] < key_end[:, None])
                if not CAUSAL:
                    allowed = allowed & (row[None, :] >= key_start[:, None])
            p = tl.where(allowed, p, 0.0)
        do_tile = load_rows(dout, start, time, dout_stride, True, HEAD_DIM, BLOCK_D, BLOCK_M)
        dv += dot(narrow(p, do_tile.dtype), do_tile)
        dp = dot(v_tile, tl.trans(do_tile))
        ds = p * (dp - tl.load(delta + row, mask=row < time, other=0.0)[None, :])
        dk += dot(narrow(ds, q_tile.dtype), q_tile)
    return dk, dv


@triton.jit
def attention_keys_backward(
    q, k, v, gate, starts, ends, dout, log_sum, delta, dk, dv,
    time, heads, group, scale, scale_log2,
    q_stride_batch, q_stride_time, q_stride_head, k_stride_batch, k_stride_time, k_stride_head,
    v_stride_batch, v_stride_time, v_stride_head, dout_stride_batch, dout_stride_time, dout_stride_head,
    CAUSAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_EDGES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key-value head, over all query heads it serves."""
    kv_heads = heads // group
    block, batch, kv_head = block_and_head(tl.cdiv(time, BLOCK_N), kv_heads)
    first = block * BLOCK_N  # early keys are seen by most queries: they already start first
    column = first + tl.arange(0, BLOCK_N)
    k += batch * k_stride_batch + kv_head * k_stride_head
    v += batch * v_stride_batch + kv_head * v_stride_head
    k_tile = load_rows(k, first, time, k_stride_time, True, HEAD_DIM, BLOCK_D, BLOCK_N)
    v_tile = load_rows(v, first, time, v_stride_time, True, HEAD_DIM, BLOCK_D, BLOCK_N)

    # queries of [low, left) and [right, high) are masked, those of [left, right) see every key of the block
    low, left, high, key_start, key_end = 0, 0, time, column, column
    right = tl.cdiv(time, BLOCK_M) * BLOCK_M
    if CAUSAL:
        low = (first // BLOCK_M) * BLOCK_M
        left = tl.minimum(tl.cdiv(first + BLOCK_N, BLOCK_M) * BLOCK_M, right)
    if HAS_EDGES:
        starts += batch * time
        ends += batch * time
        key_start = tl.load(starts + column, mask=column < time, other=0)
        key_end = tl.load(ends + column, mask=column < time, other=0)
        last = tl.minimum(first + BLOCK_N, time) - 1
        high = tl.load(ends + last)
        right = (tl.load(ends + first) // BLOCK_M) * BLOCK_M
        if not CAUSAL:
            low = (tl.load(starts + first) // BLOCK_M) * BLOCK_M
            left = tl.cdiv(tl.load(starts + last), BLOCK_M) * BLOCK_M
        left = tl.minimum(left, tl.cdiv(high, BLOCK_M) * BLOCK_M)
        right = tl.maximum(left, right)

    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for member in range(group):
        head = kv_head * group + member
        g = 1.0
        if HAS_GATE:
            g = tl.load(gate + head).to(tl.float32)
        if g != 0:
            log2_gate = 0.0
            if HAS_GATE:
                log2_gate = tl.log2(g)
            q_head = q + batch * q_stride_batch + head * q_stride_head
            dout_head = dout + batch * dout_stride_batch + head * dout_stride_head
            log_sum_head = log_sum + (batch * heads + head) * time
            delta_head = delta + (batch * heads + head) * time
            if CAUSAL or HAS_EDGES:
                dk_acc, dv_acc = _key_steps(
                    dk_acc, dv_acc, k_tile, v_tile, q_head, dout_head, log_sum_head, delta_head, log2_gate,
                    low, left, column, key_start, key_end, time, q_stride_time, dout_stride_time, scale_log2,
                    True, CAUSAL, HAS_EDGES, HEAD_DIM, BLOCK_D, BLOCK_M,
                )  # fmt: skip
            dk_acc, dv_acc = _key_steps(
                dk_acc, dv_acc, k_tile, v_tile, q_head, dout_head, log_sum_head, delta_head, log2_gate,
                left, right, column, key_start, key_end, time, q_stride_time, dout_stride_time, scale_log2,
                False, CAUSAL, HAS_EDGES, HEAD_DIM, BLOCK_D, BLOCK_M,
            )  # fmt: skip
            if HAS_EDGES:
                dk_acc, dv_acc = _key_steps(
                    dk_acc, dv_acc, k_tile, v_tile, q_head, dout_head, log_sum_head, delta_head, log2_gate,
                    right, high, column, key_start, key_end, time, q_stride_time, dout_stride_time, scale_log2,
                    True, CAUSAL, HAS_EDGES, HEAD_DIM, BLOCK_D, BLOCK_M,
                )  # fmt: skip
    offset = batch * time * kv_heads * HEAD_DIM + kv_head * HEAD_DIM
    store_rows(dk + offset, first, time, kv_heads * HEAD_DIM, dk_acc * scale, HEAD_DIM, BLOCK_D, BLOCK_N)
    store_rows(dv + offset, first, time, kv_heads * HEAD_DIM, dv_acc, HEAD_DIM, BLOCK_D, BLOCK_N)


@triton.jit
def _query_steps(
    dq, q_tile, do_tile, bound, value, k, v, low, high, row, row_start, row_end, time, k_stride, v_stride, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_EDGES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        k_tile = load_rows(k, start, time, k_stride, MASKED, HEAD_DIM, BLOCK_D, BLOCK_N)
        p = tl.exp2(dot(q_tile, tl.trans(k_tile)) * scale_log2 - bound[:, None])  # [M, N]
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            allowed = allowed_pairs(
                row[:, None], column[None, :], time, row_start[:, None], row_end[:, None], CAUSAL, HAS_EDGES
            )
            p = tl.where(allowed, p, 0.0)
        v_tile = load_rows(v, start, time, v_stride, MASKED, HEAD_DIM, BLOCK_D, BLOCK_N)
        ds = p * (dot(do_tile, tl.trans(v_tile)) - value[:, None])
        dq += dot(narrow(ds, k_tile.dtype), k_tile)
    return dq


@triton.jit
def attention_queries_backward(
    q, k, v, gate, starts, ends, dout, log_sum, delta, dq,
    time, heads, group, scale, scale_log2,
    q_stride_batch, q_stride_time, q_stride_head, k_stride_batch, k_stride_time, k_stride_head,
    v_stride_batch, v_stride_time, v_stride_head, dout_stride_batch, dout_stride_time, dout_stride_head,
    CAUSAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_EDGES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head."""
    blocks = tl.cdiv(time, BLOCK_M)
    block, batch, head = block_and_head(blocks, heads)
    first = (blocks - 1 - block) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    dq += batch * time * heads * HEAD_DIM + head * HEAD_DIM
    log2_gate = 0.0
    if HAS_GATE:
        g = tl.load(gate + head).to(tl.float32)
        if g == 0:
            zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            store_rows(dq, first, time, heads * HEAD_DIM, zeros, HEAD_DIM, BLOCK_D, BLOCK_M)
            return
        log2_gate = tl.log2(g)
    q += batch * q_stride_batch + head * q_stride_head
    k += batch * k_stride_batch + (head // group) * k_stride_head
    v += batch * v_stride_batch + (head // group) * v_stride_head
    dout += batch * dout_stride_batch + head * dout_stride_head
    if HAS_EDGES:
        starts += batch * time
        ends += batch * time
    low, left, right, high, row_start, row_end = keys_of_queries(
        first, time, starts, ends, row, CAUSAL, HAS_EDGES, BLOCK_M, BLOCK_N
    )
    q_tile = load_rows(q, first, time, q_stride_time, True, HEAD_DIM, BLOCK_D, BLOCK_M)
    do_tile = load_rows(dout, first, time, dout_stride_time, True, HEAD_DIM, BLOCK_D, BLOCK_M)
    at = (batch * heads + head) * time + row
    bound = tl.load(log_sum + at, mask=row < time, other=0.0) - log2_gate
    value = tl.load(delta + at, mask=row < time, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    if HAS_EDGES:
        acc = _query_steps(
            acc, q_tile, do_tile, bound, value, k, v, low, left, row, row_start, row_end, time,
            k_stride_time, v_stride_time, scale_log2, True, CAUSAL, HAS_EDGES, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc = _query_steps(
        acc, q_tile, do_tile, bound, value, k, v, left, right, row, row_start, row_end, time,
        k_stride_time, v_stride_time, scale_log2, False, CAUSAL, HAS_EDGES, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc = _query_steps(
        acc, q_tile, do_tile, bound, value, k, v, right, high, row, row_start, row_end, time,
        k_stride_time, v_stride_time, scale_log2, True, CAUSAL, HAS_EDGES, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    store_rows(dq, first, time, heads * HEAD_DIM, acc * scale, HEAD_DIM, BLOCK_D, BLOCK_M)
