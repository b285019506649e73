# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""``select`` in Triton: one gather forward, one scatter backward, each a single pass over what it writes.

    out[i, j]      = weight[rows[i], columns[j]] * row_scale[i] * column_scale[j]
    dweight[r, c]  = (dout * column_scale * row_scale)[row_position[r], column_position[c]]   0 where -1: not kept
    drow_scale[i]  = sum over j of dout[i, j] * column_scale[j] * weight[rows[i], columns[j]], the columns' likewise

Bytes moved, fp32 to bf16, half of both axes of n * m kept: 2.5 n m forward (kept rows whole, since kept columns lie
scattered and touch every sector of 32 bytes; then the output), 4.5 n m backward (the gradient once, then the weight's,
zeros included: no fill before it). Loads are made in the shape [rows, groups of 32, 32], so that the threads of a warp
read neighbouring kept columns (with [rows, columns] Triton gives a thread 8 of them, a warp touches 16 lines at once);
stores in the shape [rows, columns], 16 bytes a thread. Offsets are 64-bit. Scales multiply in float32 on the way. Where
their gradients are asked for, the part is kept unscaled, so that no backward needs the weight: scales multiply it in a
second pass, and a third, backward, sums in two stages.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels import gather_blocks
from shear_kernels.gather_blocks import kept_rows, pieces
from shear_kernels.precision import narrow
from shear_kernels.torch_op import nothing, torch_op

ROWS = 4  # a block reads its indices once for 4 rows
SCALE_STEPS = 16  # rows a block of the scales' gradients walks: 64 of them, one partial sum a column
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
    weight, rows, columns, row_scale, column_scale, out,
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
    if row_scale is not None:
        x = x.to(tl.float32) * tl.load(row_scale + row, mask=row_inside, other=0.0).to(tl.float32)[:, None, None]
    if column_scale is not None:
        x = x.to(tl.float32) * tl.load(column_scale + column, mask=column_inside, other=0.0).to(tl.float32)[None, :, :]
    _store(out, row, first, kept_rows, kept_columns, _convert(x, out.dtype.element_ty), ROWS, COLUMNS)


@triton.jit
def select_scatter(
    dout, row_position, column_position, row_scale, column_scale, dweight,
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
    if column_scale is not None:
        scale = tl.load(column_scale + source_column, mask=column_kept, other=0.0).to(tl.float32)
        x = x.to(tl.float32) * scale[None, :, :]
    if row_scale is not None:
        scale = tl.load(row_scale + source_row, mask=row_kept, other=0.0).to(tl.float32)
        x = x.to(tl.float32) * scale[:, None, None]
    _store(dweight, row, first, rows, columns, _convert(x, dweight.dtype.element_ty), ROWS, COLUMNS)


@triton.jit
def select_scale_gradients(
    part, row_scale, column_scale, dout, row_partial, column_partial,
    kept_rows, kept_columns, row_stride, column_stride, dout_row_stride, dout_column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sums of dout * part in a block: over columns [column blocks, kept_rows], over rows [row blocks, kept_columns]."""
    across = tl.cdiv(kept_columns, COLUMNS)
    block, block_across = tl.program_id(0) // across, (tl.program_id(0) % across).to(tl.int64)
    column = block_across * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < kept_columns
    if column_scale is not None:
        across_scale = tl.load(column_scale + column, mask=column_inside, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for step in range(STEPS):
        row = (block.to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        row_inside = row < kept_rows
        inside = row_inside[:, None] & column_inside[None, :]
        source = part + row[:, None] * row_stride + column[None, :] * column_stride
        upstream = dout + row[:, None] * dout_row_stride + column[None, :] * dout_column_stride
        product = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        product *= tl.load(upstream, mask=inside, other=0.0).to(tl.float32)
        if row_partial is not None:
            terms = product
            if column_scale is not None:
                terms *= across_scale[None, :]
            tl.store(row_partial + block_across * kept_rows + row, tl.sum(terms, 1), mask=row_inside)
        if column_partial is not None:
            if row_scale is not None:
                product *= tl.load(row_scale + row, mask=row_inside, other=0.0).to(tl.float32)[:, None]
            total += tl.sum(product, 0)
    if column_partial is not None:
        tl.store(column_partial + block.to(tl.int64) * kept_columns + column, total, mask=column_inside)


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


def _fake_gather(
    weights: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Tensor | None,
    row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    width = weights[0].shape[1] if columns is None else columns.shape[0]
    return weights[0].new_empty(sum(kept_rows(weights, rows)), width, dtype=dtype)


@torch_op(_fake_gather)
def gather(
    weights: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Tensor | None,
    row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The parts of weights of one width, one under another. row_scale: [kept rows of all]."""
    out = _fake_gather(weights, rows, columns, row_scale, column_scale, dtype)
    counts, first = kept_rows(weights, rows), 0
    for weight, kept, count in zip(weights, rows, counts, strict=True):
        piece = slice(first, first := first + count)
        part, scale = out[piece], None if row_scale is None else row_scale[piece]
        if part.numel():
            with torch.cuda.device_of(weight):
                select_gather[_grid(*part.shape)](
                    weight, kept, columns, scale, column_scale, part, *part.shape, *weight.stride(),
                    ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
                )  # fmt: skip
    return out


def _fake_scatter(
    dout: Tensor, rows: Tensor | None, columns: Tensor | None,
    row_scale: Tensor | None, column_scale: Tensor | None, size: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return dout.new_empty(size, dtype=dtype)


@torch_op(_fake_scatter)
def scatter(
    dout: Tensor, rows: Tensor | None, columns: Tensor | None,
    row_scale: Tensor | None, column_scale: Tensor | None, size: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight's gradient, [size] in dtype."""
    dweight = dout.new_empty(size, dtype=dtype)
    if dweight.numel():
        with torch.cuda.device_of(dout):
            select_scatter[_grid(*size)](
                dout, _position(rows, size[0]), _position(columns, size[1]), row_scale, column_scale, dweight,
                *size, *dout.stride(), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
            )  # fmt: skip
    return dweight


def _fake_scales(
    part: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, dout: Tensor
) -> tuple[Tensor, Tensor]:
    drow, dcolumn = (nothing(dout) if t is None else torch.empty_like(t) for t in (row_scale, column_scale))
    return drow, dcolumn


@torch_op(_fake_scales)
def scale_gradients(
    part: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """drow_scale, dcolumn_scale; part: before it was scaled."""
    kept_rows, kept_columns = dout.shape
    down, across = triton.cdiv(kept_rows, ROWS * SCALE_STEPS), triton.cdiv(kept_columns, COLUMNS)
    row_partial = None if row_scale is None else dout.new_empty(across, kept_rows, dtype=torch.float32)
    column_partial = None if column_scale is None else dout.new_empty(down, kept_columns, dtype=torch.float32)
    if dout.numel():
        with torch.cuda.device_of(dout):
            select_scale_gradients[(down * across,)](
                part, row_scale, column_scale, dout, row_partial, column_partial,
                kept_rows, kept_columns, *part.stride(), *dout.stride(),
                ROWS=ROWS, COLUMNS=COLUMNS, STEPS=SCALE_STEPS, num_warps=WARPS,
            )  # fmt: skip
    drow, dcolumn = _fake_scales(part, row_scale, column_scale, dout)
    if row_scale is not None and row_partial is not None:
        drow = row_partial.sum(0).to(row_scale.dtype)
    if column_scale is not None and column_partial is not None:
        dcolumn = column_partial.sum(0).to(column_scale.dtype)
    return drow, dcolumn


class _Select(torch.autograd.Function):
    """Of one weight, or of several without scales. Keeps the part, not the weight, for the scales' gradients: FSDP lets
    a weight go after the forward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Sequence[Tensor | None], columns: Tensor | None,
        row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        part = None
        ctx.wholes = [(weight.shape, weight.dtype) for weight in weights]
        ctx.counts = kept_rows(weights, rows)
        if any(ctx.needs_input_grad[2:4]):
            (part,) = weights
            if rows[0] is not None or columns is not None:
                part = gather(weights, rows, columns, None, None, part.dtype)
            out: Tensor = gather([part], [None], None, row_scale, column_scale, dtype)
        else:
            out = gather(weights, rows, columns, row_scale, column_scale, dtype)
        ctx.save_for_backward(part, columns, row_scale, column_scale, *rows)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        part, columns, row_scale, column_scale, *rows = ctx.saved_tensors
        parts = pieces(dout, ctx.counts)
        dweights = [
            scatter(piece, kept, columns, row_scale, column_scale, *whole) if needed else None
            for piece, kept, whole, needed in zip(parts, rows, ctx.wholes, ctx.needs_input_grad[5:], strict=True)
        ]
        drow, dcolumn = (None, None) if part is None else scale_gradients(part, row_scale, column_scale, dout)
        scales = None if row_scale is None else drow, None if column_scale is None else dcolumn
        return None, None, *scales, None, *dweights


def select(
    weight: Tensor, rows: Tensor | None, columns: Tensor | None = None, dtype: torch.dtype | None = None,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``weight[rows][:, columns] * row_scale[:, None] * column_scale`` in ``dtype``. weight: [n] or [n, m] of any
    strides; rows and columns are contiguous. Vectors and float64 take the plain way."""
    scales = row_scale, column_scale
    dtypes = [weight.dtype, dtype, *(s.dtype for s in scales if s is not None)]
    if weight.dim() == 1 or torch.float64 in dtypes:
        return gather_blocks.select(weight, rows, columns, dtype, *scales)
    row_scale, column_scale = (None if s is None else s.contiguous() for s in scales)
    out: Tensor = _Select.apply([rows], columns, row_scale, column_scale, dtype or weight.dtype, weight)
    return out


def select_joined(
    weights: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """``weight[rows][:, columns]`` of each weight, one under another: a launch for each, into one buffer."""
    dtype = dtype or weights[0].dtype
    if torch.float64 in (dtype, weights[0].dtype):
        return gather_blocks.select_joined(weights, rows, columns, dtype)
    out: Tensor = _Select.apply(rows, columns, None, None, dtype, *weights)
    return out
