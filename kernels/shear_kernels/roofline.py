"""Least time of each op: bytes that must cross memory and FLOPs that must be done, as functions of the shape.

Bytes count every input read once and every output written once, with a cache that holds the rest. FLOPs count a
multiplication and an addition as two, matrix products only. ``open_share`` is the share of heads or columns whose gate
is not exactly 0: closed ones need no read and no product, only their zeros written.
"""

from dataclasses import dataclass

GATE_BYTES = 4  # gates, norm weights and statistics are float32


@dataclass(frozen=True)
class Device:
    """Peak rates from the maker's data sheets: dense 16-bit matrix FLOP/s, memory bytes/s."""

    name: str
    flops: float
    bandwidth: float

    def seconds(self, work: "Work") -> float:
        """Roofline time of ``work``: no implementation is faster."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops)


H100 = Device("H100 SXM", 989e12, 3.35e12)
H200 = Device("H200", 989e12, 4.8e12)
A100 = Device("A100 80GB SXM", 312e12, 2.039e12)
DEVICES = (H100, H200, A100)


@dataclass(frozen=True)
class Work:
    """What an op must do at least."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def masked_attention(
    batch: int,
    time: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool = True,
    open_share: float = 1.0,
    element_bytes: int = 2,
) -> tuple[Work, Work]:
    """(forward, backward). Forward 2 products of [time, time, head_dim] a head, backward 5 (scores, dP, dV, dK, dQ)."""
    query = batch * time * heads * head_dim * element_bytes  # bytes of q, and of out
    key = batch * time * kv_heads * head_dim * element_bytes  # bytes of k, and of v
    statistics = batch * time * heads * GATE_BYTES
    product = 2.0 * batch * heads * time * time * head_dim * open_share * (0.5 if causal else 1.0)
    forward = Work((open_share + 1) * query + 2 * key + open_share * statistics, 2 * product)
    # reads q, out, dout of open heads, k, v, log_sum; writes dq whole, dk, dv
    backward = Work((3 * open_share + 1) * query + 4 * key + open_share * statistics, 5 * product)
    return forward, backward


def masked_swiglu(rows: int, ffn: int, open_share: float = 1.0, element_bytes: int = 2) -> tuple[Work, Work]:
    """(forward: read gate, up, write out; backward: read gate, up, dout, write dgate, dup)."""
    whole = rows * ffn * element_bytes
    return Work((2 * open_share + 1) * whole + ffn * GATE_BYTES), Work(
        (3 * open_share + 2) * whole + 2 * ffn * GATE_BYTES
    )


def masked_gelu(rows: int, ffn: int, open_share: float = 1.0, element_bytes: int = 2) -> tuple[Work, Work]:
    """(forward: read x, write out; backward: read x, dout, write dx)."""
    whole, mask = rows * ffn * element_bytes, ffn * GATE_BYTES
    return Work((open_share + 1) * whole + mask), Work((2 * open_share + 1) * whole + 2 * mask)


def masked_rms_norm(rows: int, hidden: int, element_bytes: int = 2) -> tuple[Work, Work]:
    """(forward: read x, write out; backward: read x, dout, write dx). Closed columns are read: they lie scattered."""
    whole, vectors = rows * hidden * element_bytes, 2 * hidden * GATE_BYTES
    return Work(2 * whole + vectors + rows * GATE_BYTES), Work(3 * whole + 2 * vectors + rows * GATE_BYTES)


def gated_residual(rows: int, hidden: int, element_bytes: int = 2) -> tuple[Work, Work]:
    """(forward: read two, write one; backward: read the gradient and branch, write one: the other is the gradient)."""
    whole, vector = rows * hidden * element_bytes, hidden * GATE_BYTES
    return Work(3 * whole + vector), Work(3 * whole + 2 * vector)


def add_rms_norm(rows: int, hidden: int, element_bytes: int = 2) -> tuple[Work, Work]:
    """(forward: read two, write two; backward: read stream, branch, two gradients, write two gradients)."""
    whole, vectors = rows * hidden * element_bytes, 2 * hidden * GATE_BYTES
    return Work(4 * whole + vectors + rows * GATE_BYTES), Work(6 * whole + 2 * vectors + rows * GATE_BYTES)


def rope(rows: int, heads: int, kv_heads: int, head_dim: int, element_bytes: int = 2) -> tuple[Work, Work]:
    """(forward, backward): q and k read and written, cos and sin of [rows, head_dim / 2] read."""
    work = Work(2 * rows * (heads + kv_heads) * head_dim * element_bytes + rows * head_dim * GATE_BYTES)
    return work, work


def select(
    rows: int, columns: int, kept_rows: int, kept_columns: int, element_bytes: int = 2, master_bytes: int = 4
) -> tuple[Work, Work]:
    """(forward: read kept rows, write the part; backward: read the part's gradient, write the weight's, zeros too).

    Of a kept row every byte is read where columns are scattered: a sector of 32 bytes holds a kept one almost surely.
    ``master_bytes``: of an element of the weight; ``element_bytes``: of the part.
    """
    part = kept_rows * kept_columns * element_bytes
    part += 8 * (kept_rows + kept_columns)  # and its indices
    return Work(kept_rows * columns * master_bytes + part), Work(rows * columns * master_bytes + part)


def vocab_cross_entropy(tokens: int, hidden: int, vocab: int, element_bytes: int = 2) -> tuple[Work, Work]:
    """(forward: one product; backward: two, and the forward's again, since logits are not kept)."""
    x, weight, product = tokens * hidden * element_bytes, vocab * hidden * element_bytes, 2.0 * tokens * hidden * vocab
    return Work(x + weight + tokens * GATE_BYTES, product), Work(
        2 * x + weight + vocab * hidden * GATE_BYTES, 3 * product
    )
