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
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from torch import Tensor, cuda, dtype, float64, int64

from shear_kernels import dense_attention, gather_blocks, reference
from shear_kernels.cross_entropy import vocab_cross_entropy
from shear_kernels.dense_attention import AttentionBackend
from shear_kernels.distillation import vocab_distillation
from shear_kernels.reference import gated_residual

Backend = Literal["triton", "reference"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _module(name: str) -> Any:
    """A module of kernels, imported when it is first needed: ``import shear_kernels`` works without triton."""
    if find_spec("triton") is None:
        raise ValueError("backend='triton' needs triton; pip install triton, or use backend='reference'")
    return import_module(f"shear_kernels.{name}")


@cache
def _have_triton() -> bool:
    return find_spec("triton") is not None


def _kernels(x: Tensor, backend: str | None, module: str) -> Any:
    """The module whose function of the op's name serves ``x``."""
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend={backend!r} is not one of 'triton', 'reference' or None (choose)")
    if x.dtype == float64 and backend != "triton":
        return reference
    if backend == "triton" or (backend is None and (x.is_cuda or INTERPRETED) and _have_triton()):
        return _module(module)
    return reference


def fuses_masks(x: Tensor) -> bool:
    """Whether kernels serve ``x``. A mask then costs next to nothing; in the definitions it is a pass of its own."""
    return _kernels(x, None, "swiglu") is not reference


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

    On CUDA the backend is the fastest measured on this device, gated or not (``dense_attention.MEASURED``); ``backend``
    overrides it: "triton", "reference", "sdpa", "sdpa_flash", "sdpa_cudnn" or "flash_attn".
    """
    if window is not None:
        if window < 1 or not causal:
            raise ValueError(
                f"window={window} with causal={causal}; a window is at least 1 and looks back (causal=True)"
            )
        window = None if window >= q.shape[1] else window  # every key before is seen anyway
    if backend is None and q.is_cuda and q.dtype != float64:
        names_edges = cu_seqlens is not None or window is not None
        backend = dense_attention.choose(cuda.get_device_name(q.device), head_mask is not None, names_edges)
    if backend in ("sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn"):
        return dense_attention.masked_attention(q, k, v, head_mask, causal, cu_seqlens, window, backend)
    out: Tensor = _kernels(q, backend, "attention").masked_attention(q, k, v, head_mask, causal, cu_seqlens, window)
    return out


def masked_swiglu(gate: Tensor, up: Tensor, mask: Tensor | None = None, backend: Backend | None = None) -> Tensor:
    """``silu(gate) * up * mask``. gate, up: [..., ffn]; mask: [ffn]. Returns [..., ffn]."""
    out: Tensor = _kernels(gate, backend, "swiglu").masked_swiglu(gate, up, mask)
    return out


def masked_gelu(
    x: Tensor,
    mask: Tensor | None = None,
    approximate: Literal["none", "tanh"] = "none",
    backend: Backend | None = None,
) -> Tensor:
    """``gelu(x) * mask``. x: [..., ffn]; mask: [ffn]; approximate: as in ``F.gelu``. Returns [..., ffn]."""
    _kernels(x, backend, "reference")  # no kernel yet: the definition serves every backend
    return reference.masked_gelu(x, mask, approximate)


def masked_rms_norm(
    x: Tensor, weight: Tensor, hidden_mask: Tensor | None = None, eps: float = 1e-5, backend: Backend | None = None
) -> Tensor:
    """RMS norm over the kept width, scaled by ``weight * hidden_mask``. x: [..., hidden], zero where hidden_mask is;
    weight, hidden_mask: [hidden]. Returns [..., hidden]. With x [..., heads, head_dim] and weight [head_dim] it is the
    norm that Qwen3 puts on every head of q and k."""
    out: Tensor = _kernels(x, backend, "norm").masked_rms_norm(x, weight, hidden_mask, eps)
    return out


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
    _kernels(x, backend, "reference")  # no kernel yet: the definition serves every backend
    return reference.masked_layer_norm(x, weight, bias, hidden_mask, eps)


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
    module = _kernels(residual, backend, "norm")
    stream, normed = module.add_rms_norm(residual, branch, weight, hidden_mask, layer_gate, eps)
    return stream, normed


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding. q: [batch, time, heads, head_dim]; k: [batch, time, kv_heads, head_dim]; cos, sin:
    [time, rotary / 2] or [batch, time, rotary / 2]: the first ``rotary`` entries of each head turn, the others pass.
    Returns (q, k) rotated."""
    if q.shape[-1] < 2 * cos.shape[-1]:
        raise ValueError(f"{cos.shape[-1]} angles turn more than head_dim={q.shape[-1]}; use head_dim / 2 or fewer")
    q_out, k_out = _kernels(q, backend, "rotary").rope(q, k, cos, sin)
    return q_out, k_out


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
        if kept is not None and (kept.dtype != int64 or kept.dim() != 1):
            raise ValueError(f"{name}s is {kept.dtype} of size {list(kept.shape)}; use int64 indices [kept]")
        if scale is not None and scale.shape != (size := weight.shape[axis : axis + 1] if kept is None else kept.shape):
            raise ValueError(
                f"{name}_scale of size {list(scale.shape)} does not fit the kept {name}s; use {list(size)}"
            )
    if rows is None and columns is None and row_scale is None and column_scale is None:
        return weight if dtype is None else weight.to(dtype)
    module = _kernels(weight, backend, "gather")
    if module is reference and backend != "reference":
        module = gather_blocks
    out: Tensor = module.select(weight, rows, columns, dtype, row_scale, column_scale)
    return out


__all__ = [
    "add_rms_norm",
    "fuses_masks",
    "gated_residual",
    "masked_attention",
    "masked_gelu",
    "masked_layer_norm",
    "masked_rms_norm",
    "masked_swiglu",
    "rope",
    "select",
    "vocab_cross_entropy",
    "vocab_distillation",
]
