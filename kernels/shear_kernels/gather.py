# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""``select`` in Triton: one gather forward, one scatter backward, each a single pass over what it writes.

    out[i, j]      = weight[rows[i], columns[j]]
    dweight[r, c]  = dout[row_position[r], column_position[c]]    0 where a position is -1: not kept

Bytes moved, fp32 to bf16, half of both axes of n * m kept: 2.5 n m forward (kept rows whole, since kept columns lie
scattered and touch every sector of 32 bytes; then the output), 4.5 n m backward (the gradient once, then the weight's,
zeros included: no fill before it). Loads are made in the shape [rows, groups of 32, 32], so that the threads of a warp
read neighbouring kept columns (with [rows, columns] Triton gives a thread 8 of them, a warp touches 16 lines at once);
stores in the shape [rows, columns], 16 bytes a thread. Offsets are 64-bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels import gather_blocks
from shear_kernels.precision import narrow

ROWS = 4  # a block reads its indices once for 4 rows
COLUMNS = 512  # with 4 warps 16 loads in flight a thread, and 40 registers: 12 blocks on a multiprocessor
WARPS = 4


@triton.jit
def _tile(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This block's rows [ROWS], its first column, and its columns [COLUMNS / 32, 32], of a matrix with ``columns``."""
    across = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % across).to(tl.int64) * COLUMNS
    return row, first, first + tl.arange(0, COLUMNS // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def _convert(x, dtype: tl.constexpr):
    """``x`` in ``dtype``; every bit as it is where that is its own."""
    return x if x.dtype == dtype else narrow(x.to(tl.float32), dtype)


@triton.jit
def select_gather(
    weight, rows, columns, out,
    kept_rows, kept_columns, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, first, column = _tile(kept_columns, ROWS, COLUMNS)
    row_inside, column_inside = row < kept_rows, column < kept_columns
    source_row, source_column = row, column
    if rows is not None:
        source_row = tl.load(rows + row, mask=row_inside, other=0)
    if columns is not None:
        source_column = tl.load(columns + column, mask=column_inside, other=0)
    source = weight + source_row[:, None, None] * row_stride + source_column[None, :, :] * column_stride
    x = tl.load(source, mask=row_inside[:, None, None] & column_inside[None, :, :], other=0.0)
    _store(out, row, first, kept_rows, kept_columns, _convert(x, out.dtype.element_ty), ROWS, COLUMNS)


@triton.jit
def select_scatter(
    dout, row_position, column_position, dweight,
    rows, columns, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, first, column = _tile(columns, ROWS, COLUMNS)
    source_row, source_column, row_kept, column_kept = row, column, row < rows, column < columns
    if row_position is not None:
        source_row = tl.load(row_position + row, mask=row_kept, other=-1).to(tl.int64)
        row_kept = source_row >= 0
    if column_position is not None:
        source_column = tl.load(column_position + column, mask=column_kept, other=-1).to(tl.int64)
        column_kept = source_column >= 0
    source = dout + source_row[:, None, None] * row_stride + source_column[None, :, :] * column_stride
    x = tl.load(source, mask=row_kept[:, None, None] & column_kept[None, :, :], other=0.0)  # kept rows alone are read
    _store(dweight, row, first, rows, columns, _convert(x, dweight.dtype.element_ty), ROWS, COLUMNS)


@triton.jit
def _store(out, row, first, rows, columns, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x`` [ROWS, COLUMNS / 32, 32] at ``row`` and from column ``first`` on of ``out`` [rows, columns]."""
    column = first + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], tl.reshape(x, (ROWS, COLUMNS)), mask=inside)


def _grid(rows: int, columns: int) -> tuple[int]:
    """Blocks along a row follow each other: one axis, since CUDA's others end at 65,535."""
    return (triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),)


def _position(kept: Tensor | None, size: int) -> Tensor | None:
    """[size] int32: where in ``kept`` each index stands, -1 for those not in it."""
    if kept is None:
        return None
    order = torch.arange(len(kept), dtype=torch.int32, device=kept.device)
    return torch.full((size,), -1, dtype=torch.int32, device=kept.device).scatter_(0, kept, order)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
        size = [w if kept is None else len(kept) for w, kept in zip(weight.shape, (rows, columns), strict=True)]
        out = weight.new_empty(size, dtype=dtype)
        if out.numel():
            with torch.cuda.device_of(weight):
                select_gather[_grid(*size)](
                    weight, rows, columns, out, *size, *weight.stride(), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
                )
        ctx.save_for_backward(rows, columns)
        ctx.size, ctx.dtype = weight.shape, weight.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        rows, columns = ctx.saved_tensors
        dweight = dout.new_empty(ctx.size, dtype=ctx.dtype)
        if dweight.numel():
            with torch.cuda.device_of(dout):
                select_scatter[_grid(*ctx.size)](
                    dout, _position(rows, ctx.size[0]), _position(columns, ctx.size[1]), dweight,
                    *ctx.size, *dout.stride(), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
                )  # fmt: skip
        return dweight, None, None, None


def select(
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None = None,
    dtype: torch.dtype | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """``weight[rows][:, columns]`` in ``dtype``, scaled. weight: [n] or [n, m] of any strides; rows and columns are
    contiguous. Vectors, float64 and scales take the plain way."""
    if weight.dim() == 1 or torch.float64 in (weight.dtype, dtype) or not (row_scale is None and column_scale is None):
        return gather_blocks.select(weight, rows, columns, dtype, row_scale, column_scale)
    out: Tensor = _Select.apply(weight, rows, columns, dtype or weight.dtype)
    return out
