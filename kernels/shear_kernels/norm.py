# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""RMS norm over the kept width in Triton, alone or fused with the gated residual addition that precedes it.

    stream = residual + branch * layer_gate * mask            (fused form; otherwise stream = x)
    r      = 1 / sqrt(sum(stream^2) / width + eps),           width = number of mask entries that are not 0
    normed = stream * r * weight * mask
With c = sum over tokens of dnormed * stream * r and e = dnormed * weight * mask:
    dweight = c * mask,   dmask = c * weight (+ sum over tokens of dstream * branch * layer_gate),   0 where mask is 0
    dstream += r * (e - stream * r^2 / width * sum(e * stream))
    dresidual = dstream,   dbranch = dstream * layer_gate * mask,   dlayer_gate = sum(dstream * branch * mask)

One program holds a row in registers. Bytes per element of 2 bytes: norm 4 forward, 6 backward; fused 8 forward (two
reads, two writes) and 12 backward (four reads, two writes); unfused, the addition and the norm move 20 and more. The
width is counted from the mask inside the kernel: no gather, and no wait for the host.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shear_kernels import reference
from shear_kernels.precision import narrow

WIDEST = 8192  # a row must fit the registers of one program: at 16384 the backward spills 1,200 times (sm_90)
BACKWARD_PROGRAMS = 528  # four for each multiprocessor of an H100; each sums its rows' c in registers


def block_and_warps(hidden: int) -> tuple[int, int, int]:
    """Columns a program holds (a power of two), warps forward and backward: 16 elements a thread, at 8192 forward 8."""
    block = max(256, triton.next_power_of_2(hidden))
    warps = max(1, block // 512)
    return block, 32 if block > 4096 else warps, warps


@triton.jit
def add_rms_norm_forward(
    residual, branch, weight, mask, layer, stream, normed, inverse_rms,
    hidden, eps,
    HAS_BRANCH: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(residual + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    width = hidden * 1.0
    if HAS_MASK:
        z = tl.load(mask + column, mask=inside, other=0.0).to(tl.float32)
        width = tl.maximum(tl.sum((z != 0).to(tl.float32), axis=0), 1.0)
        scale *= z
    if HAS_BRANCH:
        added = tl.load(branch + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_LAYER:
            added *= tl.load(layer).to(tl.float32)
        if HAS_MASK:
            added *= z
        rounded = narrow(x + added, stream.dtype.element_ty)
        tl.store(stream + row * hidden + column, rounded, mask=inside)
        x = rounded.to(tl.float32)  # the norm sees what the next layer will see
    r = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(inverse_rms + row, r)
    tl.store(normed + row * hidden + column, narrow(x * r * scale, normed.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_backward(
    stream, branch, weight, mask, layer, inverse_rms, dnormed, dstream, dresidual, dbranch,
    c_partial, dmask_partial, dlayer_partial,
    rows, hidden,
    HAS_BRANCH: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LAYER: tl.constexpr, BLOCK: tl.constexpr,
    RELOAD: tl.constexpr,
):  # fmt: skip
    """RELOAD: read weight and mask again for every row, from the cache, where registers cannot hold them as well."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    width = hidden * 1.0
    gate = 1.0
    if HAS_LAYER:
        gate = tl.load(layer).to(tl.float32)
    if HAS_MASK:
        z = tl.load(mask + column, mask=inside, other=0.0).to(tl.float32)
        width = tl.maximum(tl.sum((z != 0).to(tl.float32), axis=0), 1.0)
        scale *= z
    c = tl.zeros((BLOCK,), dtype=tl.float32)
    dmask = tl.zeros((BLOCK,), dtype=tl.float32)
    dlayer = 0.0
    stride = tl.cast(hidden, tl.int64)
    for row_index in range(program, rows, tl.num_programs(0)):
        at = row_index * stride + column
        x = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse_rms + row_index)
        c += d * x * r
        if RELOAD:
            scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_MASK:
                z = tl.load(mask + column, mask=inside, other=0.0).to(tl.float32)
                scale *= z
        e = d * scale
        dx = r * (e - x * (r * r / width * tl.sum(e * x, axis=0)))
        if HAS_BRANCH:
            dx += tl.load(dstream + at, mask=inside, other=0.0).to(tl.float32)
            db = dx * gate
            if HAS_MASK or HAS_LAYER:
                product = dx * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
                if HAS_MASK:
                    dmask += product * gate
                    product *= z
                    db *= z
                if HAS_LAYER:
                    dlayer += tl.sum(product, axis=0)
            tl.store(dbranch + at, narrow(db, dbranch.dtype.element_ty), mask=inside)
        tl.store(dresidual + at, narrow(dx, dresidual.dtype.element_ty), mask=inside)
    partial = program.to(tl.int64) * hidden + column
    tl.store(c_partial + partial, c, mask=inside)
    if HAS_BRANCH:
        if HAS_MASK:
            tl.store(dmask_partial + partial, dmask, mask=inside)
        if HAS_LAYER:
            tl.store(dlayer_partial + program, dlayer)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        mask: Tensor | None,
        layer: Tensor | None,
        eps: float,
    ) -> tuple[Tensor | None, Tensor]:
        residual, hidden = residual.contiguous(), residual.shape[-1]
        rows = residual.numel() // hidden
        branch = None if branch is None else branch.contiguous()
        stream = residual if branch is None else torch.empty_like(residual)
        normed = torch.empty_like(residual)
        inverse_rms = torch.empty(rows, dtype=torch.float32, device=residual.device)
        block, warps, _ = block_and_warps(hidden)
        if rows:
            with torch.cuda.device_of(residual):
                add_rms_norm_forward[(rows,)](
                    residual, branch, weight, mask, layer, stream, normed, inverse_rms, hidden, eps,
                    HAS_BRANCH=branch is not None, HAS_MASK=mask is not None, HAS_LAYER=layer is not None,
                    BLOCK=block, num_warps=warps,
                )  # fmt: skip
        needs_branch = branch is not None and (mask is not None or layer is not None)
        ctx.save_for_backward(stream, branch if needs_branch else None, weight, mask, layer, inverse_rms)
        ctx.branch_dtype = None if branch is None else branch.dtype
        return None if branch is None else stream, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        stream, branch, weight, mask, layer, inverse_rms = ctx.saved_tensors
        rows, hidden = inverse_rms.shape[0], stream.shape[-1]
        has_branch = ctx.branch_dtype is not None
        programs = min(max(rows, 1), BACKWARD_PROGRAMS)

        def sums(wanted: bool, *shape: int) -> Tensor | None:
            return torch.zeros(shape, dtype=torch.float32, device=stream.device) if wanted else None

        dresidual = torch.empty_like(stream)
        dbranch = torch.empty_like(stream, dtype=ctx.branch_dtype) if has_branch else None
        c_partial = sums(True, programs, hidden)
        dmask_partial = sums(has_branch and mask is not None, programs, hidden)
        dlayer_partial = sums(has_branch and layer is not None, programs)
        block, _, warps = block_and_warps(hidden)
        if rows:
            with torch.cuda.device_of(stream):
                add_rms_norm_backward[(programs,)](
                    stream, branch, weight, mask, layer, inverse_rms,
                    dnormed.contiguous(), None if dstream is None else dstream.contiguous(), dresidual, dbranch,
                    c_partial, dmask_partial, dlayer_partial, rows, hidden,
                    HAS_BRANCH=has_branch, HAS_MASK=mask is not None, HAS_LAYER=layer is not None,
                    BLOCK=block, RELOAD=block > 4096, num_warps=warps,
                )  # fmt: skip
        assert c_partial is not None
        c = c_partial.sum(0)
        if mask is None:
            dweight, dmask = c, None
        else:
            dweight, dmask = c * mask, c * weight
            if dmask_partial is not None:
                dmask += dmask_partial.sum(0)
            dmask = dmask.where(mask != 0, 0).to(mask.dtype)
        dlayer = None
        if dlayer_partial is not None and layer is not None:
            dlayer = dlayer_partial.sum().where(layer != 0, 0).to(layer.dtype)
        return dresidual, dbranch, dweight.to(weight.dtype), dmask, dlayer, None


def _apply(
    residual: Tensor, branch: Tensor | None, weight: Tensor, mask: Tensor | None, layer: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor]:
    hidden = residual.shape[-1]
    if weight.shape != (hidden,) or (mask is not None and mask.shape != (hidden,)):
        raise ValueError(
            f"weight {tuple(weight.shape)}, mask {None if mask is None else tuple(mask.shape)} do not fit "
            f"hidden={hidden}; use [hidden]"
        )
    if branch is not None and branch.shape != residual.shape:
        raise ValueError(f"branch {tuple(branch.shape)} differs from residual {tuple(residual.shape)}; use one shape")
    mask = None if mask is None else mask.contiguous()
    stream, normed = _AddRmsNorm.apply(residual, branch, weight.contiguous(), mask, layer, eps)
    return stream, normed


def masked_rms_norm(x: Tensor, weight: Tensor, hidden_mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``x / sqrt(sum(x^2) / width + eps) * weight * hidden_mask``, as the module's head says without a branch.

    x: [..., hidden] in bf16, fp16 or fp32, zero where hidden_mask is; weight, hidden_mask: [hidden], any float dtype.
    Returns [..., hidden] in x's dtype; sums, dweight and dmask in float32. Rows wider than 8192 run the definition.
    """
    if x.shape[-1] > WIDEST:
        return reference.masked_rms_norm(x, weight, hidden_mask, eps)
    return _apply(x, None, weight, hidden_mask, None, eps)[1]


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    hidden_mask: Tensor | None = None,
    layer_gate: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(``residual + branch * layer_gate * hidden_mask``, its masked RMS norm), in one pass.

    residual, branch: [..., hidden]; weight, hidden_mask: [hidden]; layer_gate: 0-d. Both results are [..., hidden] in
    residual's dtype. Rows wider than 8192 run the definition.
    """
    if residual.shape[-1] > WIDEST:
        return reference.add_rms_norm(residual, branch, weight, hidden_mask, layer_gate, eps)
    stream, normed = _apply(residual, branch, weight, hidden_mask, layer_gate, eps)
    assert stream is not None
    return stream, normed
