# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""Masked SwiGLU in Triton: one pass forward, one pass backward.

    out   = silu(gate) * up * mask
    dgate = dout * up * mask * s * (1 + gate * (1 - s)),   s = sigmoid(gate)
    dup   = dout * silu(gate) * mask
    dmask = sum over rows of dout * silu(gate) * up        0 where the mask is exactly 0

Bytes moved per element of 2 bytes: 6 forward (two reads, a write), 10 backward (three reads, two writes). PyTorch's
three ops move 14 forward. Columns are handled in groups of eight, one 16-byte load: a group whose gates are all
exactly 0 is not read, a block of 1024 such columns exits at once, and zeros are written.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels.precision import narrow

GROUPS = 128  # groups of 8 columns a block: one 16-byte load a thread and row at 4 warps
FORWARD_ROWS = 4  # rows a block at once: eight loads in flight a thread
BACKWARD_ROWS = 2
WARPS = 4
BACKWARD_STEPS = 16  # a backward block walks 32 rows, so the partial sums of dmask are 1 % of the traffic


@triton.jit
def masked_swiglu_forward(
    gate, up, mask, out,
    rows, columns, gate_stride, up_stride,
    HAS_MASK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[:, None] * 8 + tl.arange(0, 8)[None, :]
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
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
    u = tl.load(up + row * up_stride + column_in_row, mask=read, other=0.0).to(tl.float32)
    y = g * tl.sigmoid(g) * u
    if HAS_MASK:
        y = tl.where((z != 0)[None, :, :], y * z[None, :, :], 0.0)
    tl.store(out + row * columns + column_in_row, narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def masked_swiglu_backward(
    gate, up, mask, dout, dgate, dup, dmask_partial,
    rows, columns, gate_stride, up_stride, dout_stride,
    HAS_MASK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[:, None] * 8 + tl.arange(0, 8)[None, :]
    column_in_row = column[None, :, :]
    column_inside = (column < columns)[None, :, :]
    first = tl.program_id(1) * ROWS * STEPS
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
                tl.store(dup + row * columns + column_in_row, zeros, mask=inside)
            tl.store(dmask_partial + tl.program_id(1).to(tl.int64) * columns + column, partial, mask=column < columns)
            return
        read = column_inside & (group_open != 0)[None, :, None]

    for step in range(STEPS):
        row = (first + step * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        inside = (row < rows) & column_inside
        g = tl.load(gate + row * gate_stride + column_in_row, mask=(row < rows) & read, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + column_in_row, mask=(row < rows) & read, other=0.0).to(tl.float32)
        d = tl.load(dout + row * dout_stride + column_in_row, mask=(row < rows) & read, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        silu = g * s
        if HAS_MASK:
            d_silu_u = tl.where((z != 0)[None, :, :], d * silu * u, 0.0)
            partial += tl.sum(d_silu_u, axis=0)
            d = tl.where((z != 0)[None, :, :], d * z[None, :, :], 0.0)
        dg = narrow(d * u * (s * (1 + g * (1 - s))), dgate.dtype.element_ty)
        if HAS_MASK:  # a closed column's gate may hold anything, NaN too
            dg = tl.where((z != 0)[None, :, :], dg, 0.0)
            silu = tl.where((z != 0)[None, :, :], silu, 0.0)
        tl.store(dgate + row * columns + column_in_row, dg, mask=inside)
        tl.store(dup + row * columns + column_in_row, narrow(d * silu, dup.dtype.element_ty), mask=inside)
    if HAS_MASK:
        tl.store(dmask_partial + tl.program_id(1).to(tl.int64) * columns + column, partial, mask=column < columns)


def _rows(x: Tensor) -> Tensor:
    """``x`` as [rows, columns] with adjacent columns; a view where the strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class _MaskedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
        flat_gate, flat_up = _rows(gate), _rows(up)
        rows, columns = flat_gate.shape
        out = gate.new_empty(gate.shape)
        grid = (triton.cdiv(columns, GROUPS * 8), triton.cdiv(rows, FORWARD_ROWS))
        if rows and columns:
            with torch.cuda.device_of(gate):
                masked_swiglu_forward[grid](
                    flat_gate, flat_up, mask, out,
                    rows, columns, flat_gate.stride(0), flat_up.stride(0),
                    HAS_MASK=mask is not None, ROWS=FORWARD_ROWS, GROUPS=GROUPS, num_warps=WARPS,
                )  # fmt: skip
        ctx.save_for_backward(gate, up, mask)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, mask = ctx.saved_tensors
        flat_gate, flat_up, flat_dout = _rows(gate), _rows(up), _rows(dout)
        rows, columns = flat_gate.shape
        dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
        grid = (triton.cdiv(columns, GROUPS * 8), triton.cdiv(rows, BACKWARD_ROWS * BACKWARD_STEPS))
        partial = None if mask is None else torch.zeros(grid[1], columns, dtype=torch.float32, device=gate.device)
        if rows and columns:
            with torch.cuda.device_of(gate):
                masked_swiglu_backward[grid](
                    flat_gate, flat_up, mask, flat_dout, dgate, dup, partial,
                    rows, columns, flat_gate.stride(0), flat_up.stride(0), flat_dout.stride(0),
                    HAS_MASK=mask is not None, ROWS=BACKWARD_ROWS, STEPS=BACKWARD_STEPS, GROUPS=GROUPS, num_warps=WARPS,
                )  # fmt: skip
        dmask = None if mask is None or partial is None else partial.sum(0).to(mask.dtype)
        return dgate, dup, dmask


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
    out: Tensor = _MaskedSwiglu.apply(gate, up, None if mask is None else mask.contiguous())
    return out
