"""Masked transformer ops, each with forward, backward and the gradient of its mask.

    import shear_kernels
    y = shear_kernels.masked_swiglu(gate, up, mask)

Every op is defined by the function of the same name in ``shear_kernels.reference``. Triton kernels run it on CUDA, and
on the CPU under ``TRITON_INTERPRET=1``; anywhere else, and in float64, the definition itself runs.
``backend="reference"`` or ``"triton"`` says otherwise for one call.

Kernels give a gate that is exactly 0 the gradient 0: the clamp that closed it passes none, and the closed unit's work
is skipped. (The definitions give the derivative, which that clamp discards.)
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

from torch import Tensor, compiler, dtype, float64

from shear_kernels import cross_entropy, dense_attention, gather_blocks, reference
from shear_kernels.cross_entropy import KEPT_BYTES, Reduce
from shear_kernels.dense_attention import OPS as ATTENTION_OPS
from shear_kernels.dense_attention import AttentionBackend
from shear_kernels.distillation import sampled_distillation, vocab_distillation
from shear_kernels.sampling import sample_teacher

Backend = Literal["triton", "reference"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAVE_TRITON = find_spec("triton") is not None  # and each op imports its kernels when it first needs them


def _uses_kernels(x: Tensor, backend: str | None) -> bool:
    """Whether kernels serve ``x``, or the definition."""
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend={backend!r} is not one of 'triton', 'reference' or None (choose)")
    if backend == "triton" and not HAVE_TRITON:
        raise ValueError("backend='triton' needs triton; pip install triton, or use backend='reference'")
    if backend is None and x.dtype != float64:
        return HAVE_TRITON and (x.is_cuda or INTERPRETED)
    return backend == "triton"


def fuses_masks(x: Tensor) -> bool:
    """Whether kernels serve ``x``. A mask then costs next to nothing; in the definitions it is a pass of its own."""
    return _uses_kernels(x, None)


def fuses_head_gates(x: Tensor, head_dim: int, edges: bool = False) -> bool:
    """Whether the attention chosen for ``x`` applies head gates as it goes. Where it does not, folding them into the
    output projection (``select``'s column_scale) is cheaper than masking what attention returns. ``edges``: documents
    or a window will be given."""
    if not x.is_cuda:
        return fuses_masks(x)
    return bool(dense_attention.choose(x.device, x.dtype, head_dim, False, edges) == "triton")


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_mask: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(head_dim)) v * head_mask``. q: [batch, time, heads, head_dim]; k, v: [batch, time,
    kv_heads, head_dim]; head_mask: [heads]; cu_seqlens: [documents + 1] int32, ends of documents in the flattened
    batch * time axis; window: a query sees itself and the ``window - 1`` keys before it.
    Returns [batch, time, heads, head_dim].

    On CUDA the backend is the best for the device, gated or not (``dense_attention``: by capability, or measured);
    ``backend`` overrides it: "triton", "reference", "sdpa", "sdpa_flash", "sdpa_cudnn", "varlen", "flash_attn" or
    "flash_attn_3".
    """
    if window is not None:
        if window < 1 or not causal:
            raise ValueError(
                f"window={window} with causal={causal}; a window is at least 1 and looks back (causal=True)"
            )
        window = None if window >= q.shape[1] else window  # every key before is seen anyway
    strict, edges = backend is not None, cu_seqlens is not None or window is not None
    if backend is None and q.is_cuda:
        backend = dense_attention.choose(q.device, q.dtype, q.shape[3], head_mask is not None, edges)
    if backend not in (None, "triton", "reference"):
        if backend not in get_args(AttentionBackend):
            raise ValueError(f"backend={backend!r} is not one of {get_args(AttentionBackend)} or None (choose)")
        return dense_attention.masked_attention(q, k, v, head_mask, causal, cu_seqlens, window, backend, strict)
    if not _uses_kernels(q, backend):
        return reference.masked_attention(q, k, v, head_mask, causal, cu_seqlens, window)
    from shear_kernels import attention

    return attention.masked_attention(q, k, v, head_mask, causal, cu_seqlens, window)


def masked_swiglu(gate: Tensor, up: Tensor, mask: Tensor | None = None, backend: Backend | None = None) -> Tensor:
    """``silu(gate) * up * mask``. gate, up: [..., ffn]; mask: [ffn]. Returns [..., ffn]."""
    if not _uses_kernels(gate, backend):
        return reference.masked_swiglu(gate, up, mask)
    from shear_kernels import activation

    return activation.masked_swiglu(gate, up, mask)


def masked_gelu(
    x: Tensor,
    mask: Tensor | None = None,
    approximate: Literal["none", "tanh"] = "none",
    backend: Backend | None = None,
) -> Tensor:
    """``gelu(x) * mask``. x: [..., ffn]; mask: [ffn]; approximate: as in ``F.gelu``. Returns [..., ffn]."""
    if not _uses_kernels(x, backend):
        return reference.masked_gelu(x, mask, approximate)
    from shear_kernels import activation

    return activation.masked_gelu(x, mask, approximate)


def masked_rms_norm(
    x: Tensor, weight: Tensor, hidden_mask: Tensor | None = None, eps: float = 1e-5, backend: Backend | None = None
) -> Tensor:
    """RMS norm over the kept width, scaled by ``weight * hidden_mask``. x: [..., hidden], zero where hidden_mask is;
    weight, hidden_mask: [hidden]. Returns [..., hidden]. With x [..., heads, head_dim] and weight [head_dim] it is the
    norm that Qwen3 puts on every head of q and k."""
    if not _uses_kernels(x, backend):
        return reference.masked_rms_norm(x, weight, hidden_mask, eps)
    from shear_kernels import norm

    return norm.masked_rms_norm(x, weight, hidden_mask, eps)


def masked_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    hidden_mask: Tensor | None = None,
    eps: float = 1e-5,
    backend: Backend | None = None,
) -> Tensor:
    """Layer norm over the kept width, ``(normed * weight + bias) * hidden_mask``. x: [..., hidden], zero where
    hidden_mask is; weight, bias, hidden_mask: [hidden]. Returns [..., hidden]."""
    if not _uses_kernels(x, backend):
        return reference.masked_layer_norm(x, weight, bias, hidden_mask, eps)
    from shear_kernels import layer_norm

    return layer_norm.masked_layer_norm(x, weight, bias, hidden_mask, eps)


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    hidden_mask: Tensor | None = None,
    layer_gate: Tensor | None = None,
    eps: float = 1e-5,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """(``residual + branch * layer_gate * hidden_mask``, its masked RMS norm). residual, branch: [..., hidden]; weight,
    hidden_mask: [hidden]; layer_gate: 0-d. Returns two [..., hidden]."""
    if not _uses_kernels(residual, backend):
        return reference.add_rms_norm(residual, branch, weight, hidden_mask, layer_gate, eps)
    from shear_kernels import norm

    return norm.add_rms_norm(residual, branch, weight, hidden_mask, layer_gate, eps)


def gated_residual(
    residual: Tensor,
    branch: Tensor,
    hidden_mask: Tensor | None = None,
    layer_gate: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """``residual + branch * layer_gate * hidden_mask``. residual, branch: [..., hidden]; hidden_mask: [hidden];
    layer_gate: 0-d. Returns [..., hidden]."""
    if not _uses_kernels(residual, backend):
        return reference.gated_residual(residual, branch, hidden_mask, layer_gate)
    from shear_kernels import residual as kernels

    return kernels.gated_residual(residual, branch, hidden_mask, layer_gate)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding. q: [batch, time, heads, head_dim]; k: [batch, time, kv_heads, head_dim]; cos, sin:
    [time, rotary / 2] or [batch, time, rotary / 2]: the first ``rotary`` entries of each head turn, the others pass.
    Returns (q, k) rotated."""
    if q.shape[-1] < 2 * cos.shape[-1]:
        raise ValueError(f"{cos.shape[-1]} angles turn more than head_dim={q.shape[-1]}; use head_dim / 2 or fewer")
    if not _uses_kernels(q, backend):
        return reference.rope(q, k, cos, sin)
    from shear_kernels import rotary

    return rotary.rope(q, k, cos, sin)


def select(
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None = None,
    dtype: dtype | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """``weight[rows][:, columns] * row_scale[:, None] * column_scale`` in ``dtype`` (default: the weight's).

    weight: [n] or [n, m]; rows, columns: [kept] int64 indices on its device, none twice, in any order (sorted reads
    fastest); row_scale, column_scale: one number for each kept row, column, multiplied in at least float32: how a mask
    folds into a weight. None keeps an axis whole or unscaled, and everywhere is the weight itself, at no cost.

    The gradient of the weight is in its dtype, and zero but for the kept entries. Where no kernel serves, plain PyTorch
    runs in blocks of a cache's size (``gather_blocks``), to the same bits."""
    if weight.dim() not in (1, 2) or (weight.dim() == 1 and not (columns is None and column_scale is None)):
        raise ValueError(f"weight of size {list(weight.shape)} has no such axes; use [n], or [n, m] with columns")
    for axis, (name, kept, scale) in enumerate((("row", rows, row_scale), ("column", columns, column_scale))):
        reference.require_indices(name, kept)
        if scale is not None and scale.shape != (size := weight.shape[axis : axis + 1] if kept is None else kept.shape):
            raise ValueError(
                f"{name}_scale of size {list(scale.shape)} does not fit the kept {name}s; use {list(size)}"
            )
    if rows is None and columns is None and row_scale is None and column_scale is None:
        return weight if dtype is None else weight.to(dtype)
    if _uses_kernels(weight, backend):
        from shear_kernels import gather

        return gather.select(weight, rows, columns, dtype, row_scale, column_scale)
    if backend == "reference" or compiler.is_compiling():
        return reference.select(weight, rows, columns, dtype, row_scale, column_scale)
    return gather_blocks.select(weight, rows, columns, dtype, row_scale, column_scale)


def select_joined(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    columns: Tensor | None = None,
    dtype: dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """``select`` of several weights that multiply one input, into one buffer, so that one product serves them: the
    parts one under another, [kept rows of all, kept columns].

    weights: each [n, m] with one m, device and dtype; rows: int64 indices of each, None for all. Each must be cut along
    some axis."""
    if {weight.shape[1:] for weight in weights} != {(shape := weights[0].shape)[1:]} or len(shape) != 2:
        sizes = ", ".join(str(list(weight.shape)) for weight in weights)
        raise ValueError(f"weights of sizes {sizes} do not join; use [n, m] with one m")
    if columns is None and any(kept is None for kept in rows):
        raise ValueError("a weight that keeps all its rows and columns is joined to others; multiply by it as it is")
    for name, kept in [("column", columns), *(("row", kept) for kept in rows)]:
        reference.require_indices(name, kept)
    if _uses_kernels(weights[0], backend):
        from shear_kernels import gather

        return gather.select_joined(weights, rows, columns, dtype)
    if backend == "reference" or compiler.is_compiling():
        return reference.select_joined(weights, rows, columns, dtype)
    return gather_blocks.select_joined(weights, rows, columns, dtype)


def vocab_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int = 0,
    all_reduce_max: Reduce | None = None,
    all_reduce_sum: Reduce | None = None,
    chunk: int | None = None,
    kept_bytes: int = KEPT_BYTES,
    backend: Backend | None = None,
) -> Tensor:
    """Cross entropy of every token against the LM head, or this rank's shard of it (rows from ``first`` on). x:
    [tokens, hidden]; weight: [vocab_shard, hidden]; labels: [tokens], negative where the token does not count. Returns
    [tokens]. More on the arguments, gradients and memory: ``cross_entropy.vocab_cross_entropy``."""
    kernels = x.dtype != float64 and _uses_kernels(x, backend)
    return cross_entropy.vocab_cross_entropy(
        x, weight, labels, first, all_reduce_max, all_reduce_sum, chunk, kept_bytes, kernels
    )


__all__ = [
    "ATTENTION_OPS",
    "add_rms_norm",
    "fuses_head_gates",
    "fuses_masks",
    "gated_residual",
    "masked_attention",
    "masked_gelu",
    "masked_layer_norm",
    "masked_rms_norm",
    "masked_swiglu",
    "rope",
    "sample_teacher",
    "sampled_distillation",
    "select",
    "select_joined",
    "vocab_cross_entropy",
    "vocab_distillation",
]
