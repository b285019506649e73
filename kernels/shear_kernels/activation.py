# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Masked SwiGLU and masked GELU in Triton: one pass forward, one pass backward.

    out   = a(gate) * up * mask               a: silu, gelu or its tanh form; without ``up`` (GELU) that is 1
    dgate = dout * up * mask * a'(gate)
    dup   = dout * a(gate) * mask
    dmask = sum over rows of dout * a(gate) * up        0 where the mask is exactly 0

Bytes moved per element of 2 bytes: SwiGLU 6 forward (two reads, a write), 10 backward (three reads, two writes), GELU 4
and 6. PyTorch's three ops move 14 forward. Columns are handled in groups of eight, one 16-byte load: a group whose
gates are all exactly 0 is not read, a block of 1024 such columns exits at once, and zeros are written.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels.precision import narrow
from shear_kernels.torch_op import nothing, torch_op

GROUPS = 128  # groups of 8 columns a block: one 16-byte load a thread and row at 4 warps
FORWARD_ROWS = 4  # rows a block at once: eight loads in flight a thread
BACKWARD_ROWS = 2
WARPS = 4
BACKWARD_STEPS = 16  # a backward block walks 32 rows, so the partial sums of dmask are 1 % of the traffic


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """a(x) and a'(x); what is not used is not computed. gelu_tanh is x sigmoid(2 u), u the argument of its tanh."""
    if KIND == "gelu":
        y = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = y + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        y = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = y + x * y * (1 - y) * (1.5957691216057308 * (1 + 3 * 0.044715 * x * x))
    else:
        y = tl.sigmoid(x)
        slope = y * (1 + x * (1 - y))
    return x * y, slope


@triton.jit
def _block(columns, GROUPS: tl.constexpr):
    """This block's place among the rows' blocks, and its columns [GROUPS, 8]; blocks along a row follow each other, on
    one axis, since CUDA's others end at 65,535."""
    across = tl.cdiv(columns, GROUPS * 8)
    column = ((tl.program_id(0) % across) * GROUPS + tl.arange(0, GROUPS))[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.program_id(0) // across, column


@triton.jit
def activation_forward(
    gate, up, mask, out,
    rows, columns, gate_stride, up_stride,
    KIND: tl.constexpr, HAS_UP: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    block, column = _block(columns, GROUPS)
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    inside = (row < rows) & (column < columns)[None, :, :]
    column_in_row = column[None, :, :]
    read = inside
    if HAS_MASK:
        z = tl.load(mask + column, mask=column < columns, other=0.0).to(tl.float32)
        group_open = tl.max((z != 0).to(tl.int32), axis=1)
        if tl.max(group_open, axis=0) == 0:
            zeros = tl.zeros((ROWS, GROUPS, 8), dtype=out.dtype.element_ty)
            tl.store(out + row * columns + column_in_row, zeros, mask=inside)
            return
        read = inside & (group_open != 0)[None, :, None]

    g = tl.load(gate + row * gate_stride + column_in_row, mask=read, other=0.0).to(tl.float32)
    y, _ = _activation(g, KIND)
    if HAS_UP:
        y *= tl.load(up + row * up_stride + column_in_row, mask=read, other=0.0).to(tl.float32)
    if HAS_MASK:
        y = tl.where((z != 0)[None, :, :], y * z[None, :, :], 0.0)
    tl.store(out + row * columns + column_in_row, narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward(
    gate, up, mask, dout, dgate, dup, dmask_partial,
    rows, columns, gate_stride, up_stride, dout_stride,
    KIND: tl.constexpr, HAS_UP: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    block, column = _block(columns, GROUPS)
    column_in_row = column[None, :, :]
    column_inside = (column < columns)[None, :, :]
    first = block * ROWS * STEPS
    partial = tl.zeros((GROUPS, 8), dtype=tl.float32)
    read = column_inside
    if HAS_MASK:
        z = tl.load(mask + column, mask=column < columns, other=0.0).to(tl.float32)
        group_open = tl.max((z != 0).to(tl.int32), axis=1)
        if tl.max(group_open, axis=0) == 0:
            zeros = tl.zeros((ROWS, GROUPS, 8), dtype=dgate.dtype.element_ty)
            for step in range(STEPS):
                row = (first + step * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
                inside = (row < rows) & column_inside
                tl.store(dgate + row * columns + column_in_row, zeros, mask=inside)
                if HAS_UP:
                    tl.store(dup + row * columns + column_in_row, zeros, mask=inside)
            tl.store(dmask_partial + block.to(tl.int64) * columns + column, partial, mask=column < columns)
            return
        read = column_inside & (group_open != 0)[None, :, None]

    for step in range(STEPS):
        row = (first + step * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        inside = (row < rows) & column_inside
        g = tl.load(gate + row * gate_stride + column_in_row, mask=(row < rows) & read, other=0.0).to(tl.float32)
        d = tl.load(dout + row * dout_stride + column_in_row, mask=(row < rows) & read, other=0.0).to(tl.float32)
        y, slope = _activation(g, KIND)
        if HAS_UP:
            u = tl.load(up + row * up_stride + column_in_row, mask=(row < rows) & read, other=0.0).to(tl.float32)
        if HAS_MASK:
            dz = d * y * u if HAS_UP else d * y
            partial += tl.sum(tl.where((z != 0)[None, :, :], dz, 0.0), axis=0)
            d = tl.where((z != 0)[None, :, :], d * z[None, :, :], 0.0)
        dg = narrow(d * u * slope if HAS_UP else d * slope, dgate.dtype.element_ty)
        if HAS_MASK:  # a closed column's gate may hold anything, NaN too
            dg = tl.where((z != 0)[None, :, :], dg, 0.0)
            y = tl.where((z != 0)[None, :, :], y, 0.0)
        tl.store(dgate + row * columns + column_in_row, dg, mask=inside)
        if HAS_UP:
            tl.store(dup + row * columns + column_in_row, narrow(d * y, dup.dtype.element_ty), mask=inside)
    if HAS_MASK:
        tl.store(dmask_partial + block.to(tl.int64) * columns + column, partial, mask=column < columns)


def row_blocks(rows: int, rows_a_block: int) -> int:
    blocks: int = triton.cdiv(rows, rows_a_block)
    return blocks


def grid(rows: int, columns: int, rows_a_block: int) -> tuple[int]:
    """Blocks of a launch."""
    return (triton.cdiv(columns, GROUPS * 8) * row_blocks(rows, rows_a_block),)


def _rows(x: Tensor | None) -> Tensor | None:
    """``x`` as [rows, columns] with adjacent columns; a view where the strides allow it."""
    flat = None if x is None else x.reshape(-1, x.shape[-1])
    return flat if flat is None or flat.stride(1) == 1 else flat.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _fake_forward(gate: Tensor, up: Tensor | None, mask: Tensor | None, kind: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch_op(_fake_forward)
def activation(gate: Tensor, up: Tensor | None, mask: Tensor | None, kind: str) -> Tensor:
    flat_gate, flat_up, out = _rows(gate), _rows(up), gate.new_empty(gate.shape)
    assert flat_gate is not None
    rows, columns = flat_gate.shape
    if out.numel():
        with torch.cuda.device_of(gate):
            activation_forward[grid(rows, columns, FORWARD_ROWS)](
                flat_gate, flat_up, mask, out, rows, columns, flat_gate.stride(0), _stride(flat_up),
                KIND=kind, HAS_UP=up is not None, HAS_MASK=mask is not None, ROWS=FORWARD_ROWS, GROUPS=GROUPS,
                num_warps=WARPS,
            )  # fmt: skip
    return out


def _fake_backward(
    gate: Tensor, up: Tensor | None, mask: Tensor | None, dout: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    dup = nothing(gate) if up is None else up.new_empty(up.shape)
    return gate.new_empty(gate.shape), dup, nothing(gate) if mask is None else torch.empty_like(mask)


@torch_op(_fake_backward)
def activation_gradients(
    gate: Tensor, up: Tensor | None, mask: Tensor | None, dout: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate, dup, dmask."""
    flat_gate, flat_up, flat_dout = _rows(gate), _rows(up), _rows(dout)
    assert flat_gate is not None
    rows, columns = flat_gate.shape
    dgate, dup, dmask = _fake_backward(gate, up, mask, dout, kind)
    taken, partial = BACKWARD_ROWS * BACKWARD_STEPS, None
    if mask is not None:
        partial = torch.empty(row_blocks(rows, taken), columns, dtype=torch.float32, device=gate.device)
    if gate.numel():
        with torch.cuda.device_of(gate):
            activation_backward[grid(rows, columns, taken)](
                flat_gate, flat_up, mask, flat_dout, dgate, None if up is None else dup, partial,
                rows, columns, flat_gate.stride(0), _stride(flat_up), _stride(flat_dout),
                KIND=kind, HAS_UP=up is not None, HAS_MASK=mask is not None,
                ROWS=BACKWARD_ROWS, STEPS=BACKWARD_STEPS, GROUPS=GROUPS, num_warps=WARPS,
            )  # fmt: skip
    return dgate, dup, dmask if mask is None or partial is None else partial.sum(0).to(mask.dtype)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, mask: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up, mask)
        ctx.kind = kind
        out: Tensor = activation(gate, up, mask, kind)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, mask = ctx.saved_tensors
        dgate, dup, dmask = activation_gradients(gate, up, mask, dout, ctx.kind)
        return dgate, None if up is None else dup, None if mask is None else dmask, None


def masked_swiglu(gate: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * mask``. gate, up: [..., ffn] in bf16, fp16 or fp32; mask: [ffn], any float dtype.

    Returns [..., ffn] in gate's dtype; arithmetic and dmask in float32. A column whose mask is exactly 0 is 0 in
    ``out``, ``dgate``, ``dup`` and ``dmask`` whatever gate and up hold there.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or (mask is not None and mask.shape != gate.shape[-1:]):
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}, "
            f"mask {None if mask is None else tuple(mask.shape)} do not fit; use [..., ffn] twice and [ffn]"
        )
    out: Tensor = _Activation.apply(gate, up, None if mask is None else mask.contiguous(), "silu")
    return out


def masked_gelu(x: Tensor, mask: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``gelu(x) * mask``. x: [..., ffn] in bf16, fp16 or fp32; mask: [ffn], any float dtype; approximate: "none" or
    "tanh". Returns [..., ffn] in x's dtype; closed columns as in ``masked_swiglu``."""
    if mask is not None and mask.shape != x.shape[-1:]:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit x {tuple(x.shape)}; use [ffn] and [..., ffn]")
    kind = {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
    out: Tensor = _Activation.apply(x, None, None if mask is None else mask.contiguous(), kind)
    return out
