# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""What the loss needs of a chunk's logits, in Triton: the softmax's sums, and its terms for the backward.

    top = max of a row,   terms = exp(logits - top), 0 at the row's label,   total = sum of exp(logits - top)

One program reads a row twice, the second time mostly from the second-level cache, and writes the terms in 16 bits: 10
bytes an element of 4. PyTorch's maximum, difference, exponential, sum and rounding each read and write on their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels.precision import narrow
from shear_kernels.torch_op import nothing, torch_op

BLOCK, WARPS = 4096, 8  # 16 elements a thread


@triton.jit
def exponentials_kernel(
    logits, label, top, total, terms, columns, stride,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):  # each lane has a maximum of its own: no wait for the others
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        summed = summed * tl.exp(highest - origin) + tl.exp(x - origin)
        highest = higher
    peak = tl.max(highest, axis=0)
    tl.store(top + row, peak)
    tl.store(total + row, tl.sum(summed * tl.exp(highest - peak), axis=0))
    if KEEP:
        mine = tl.load(label + row)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
            y = tl.where(column == mine, 0.0, tl.exp(x - peak))
            tl.store(terms + row * columns + column, narrow(y, terms.dtype.element_ty), mask=column < columns)


def _fake(logits: Tensor, label: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    top = logits.new_empty(logits.shape[0], dtype=torch.float32)
    terms = nothing(logits) if dtype is None else logits.new_empty(logits.shape, dtype=dtype)
    return top, torch.empty_like(top), terms


@torch_op(_fake)
def exponentials(logits: Tensor, label: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """(top, total, terms) of logits [rows, columns]; label: [rows] int64, a column or -1; dtype: of terms, None for
    none."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    top, total, terms = _fake(logits, label, dtype)
    if logits.numel():
        with torch.cuda.device_of(logits):
            exponentials_kernel[(logits.shape[0],)](
                logits, label, top, total, terms if dtype is not None else None, logits.shape[1], logits.stride(0),
                KEEP=dtype is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return top, total, terms
