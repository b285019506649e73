# ruff: noqa: N803  compile-time constants of kernels are written in capitals
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
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

import triton
import triton.language as tl

from shear_kernels.precision import narrow


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
