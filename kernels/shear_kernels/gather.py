# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""``select`` in Triton: one gather forward, one scatter backward, each a single pass over what it writes.

    out[i, j]      = weight[rows[i], columns[j]]
    dweight[r, c]  = dout[row_position[r], column_position[c]]    0 where a position is -1: not kept

Bytes moved, fp32 to bf16, half of both axes of n * m kept: 2.5 n m forward (kept rows whole, since kept columns lie
scattered and touch every sector of 32 bytes; then the output), 4.5 n m backward (the gradient once, then the weight's,
zeros included: no fill before it). A load takes 32 neighbouring kept columns a warp, 4 or 2 bytes a thread; a store 16
bytes a thread. Offsets are 64-bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels import gather_blocks
from shear_kernels.precision import narrow

ROWS = 4
COLUMNS = 1024
WARPS = 4


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
    across = tl.cdiv(kept_columns, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < kept_rows, column < kept_columns
    inside = row_inside[:, None] & column_inside[None, :]
    source_row, source_column = row, column
    if rows is not None:
        source_row = tl.load(rows + row, mask=row_inside, other=0)
    if columns is not None:
        source_column = tl.load(columns + column, mask=column_inside, other=0)
    source = weight + source_row[:, None] * row_stride + source_column[None, :] * column_stride
    x = tl.load(source, mask=inside, other=0.0)
    tl.store(out + row[:, None] * kept_columns + column[None, :], _convert(x, out.dtype.element_ty), mask=inside)


@triton.jit
def select_scatter(
    dout, row_position, column_position, dweight,
    rows, columns, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < columns
    source_row, source_column, row_kept, column_kept = row, column, row_inside, column_inside
    if row_position is not None:
        source_row = tl.load(row_position + row, mask=row_inside, other=-1).to(tl.int64)
        row_kept = source_row >= 0
    if column_position is not None:
        source_column = tl.load(column_position + column, mask=column_inside, other=-1).to(tl.int64)
        column_kept = source_column >= 0
    source = dout + source_row[:, None] * row_stride + source_column[None, :] * column_stride
    x = tl.load(source, mask=row_kept[:, None] & column_kept[None, :], other=0.0)  # a row not kept is not read
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(dweight + row[:, None] * columns + column[None, :], _convert(x, dweight.dtype.element_ty), mask=inside)


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
    weight: Tensor, rows: Tensor | None, columns: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``weight[rows][:, columns]`` in ``dtype``. weight: [n] or [n, m] of any strides; rows and columns are contiguous
    and not both None. Vectors and float64 take the plain way."""
    if weight.dim() == 1 or torch.float64 in (weight.dtype, dtype):
        return gather_blocks.select(weight, rows, columns, dtype)
    out: Tensor = _Select.apply(weight, rows, columns, dtype or weight.dtype)
    return out
