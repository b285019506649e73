"""Attention without a gate by the best library at hand, then the gate: the rivals of the masked kernel.

    "sdpa"        torch's scaled_dot_product_attention, torch's own choice of kernel
    "sdpa_flash"  the same, its FlashAttention kernel only
    "sdpa_cudnn"  the same, its cuDNN kernel only
    "flash_attn"  the flash-attn package; the only one of these that knows document boundaries

Which one is fastest is a property of the device, so the choice is a table filled by measurement:
``kernels/bench/run.py`` prints the line to add. A device without a line uses the default.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shear_kernels import reference

AttentionBackend = Literal["triton", "reference", "sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn"]

DEFAULT: AttentionBackend = "triton"
"""Unmeasured devices: the only choice that skips closed heads, knows documents and is tested without a GPU."""

MEASURED: dict[tuple[str, bool], AttentionBackend] = {}
"""(device name, gated) -> fastest backend, forward and backward together, at 25 % of the heads closed (gated) or
without a mask. Empty until a GPU has been measured."""


def choose(device_name: str, gated: bool, edges: bool) -> AttentionBackend:
    """The measured backend of a device, or the default; with documents or a window, one that knows their edges."""
    chosen = MEASURED.get((device_name, gated), DEFAULT)
    if edges and chosen not in ("triton", "flash_attn"):
        chosen = "triton"
    if chosen == "flash_attn" and find_spec("flash_attn") is None:
        chosen = DEFAULT
    return chosen


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_mask: Tensor | None,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    backend: AttentionBackend,
) -> Tensor:
    """``reference.masked_attention`` with its softmax attention computed by ``backend``; same shapes and dtypes."""
    if backend == "flash_attn":
        out = _flash_attn(q, k, v, causal, cu_seqlens, window)
        return out if head_mask is None else (out.float() * head_mask[:, None]).to(q.dtype)
    if cu_seqlens is not None:
        raise ValueError(f"backend={backend!r} knows no document boundaries; use 'triton', 'flash_attn' or 'reference'")
    if backend == "sdpa":
        return reference.masked_attention(q, k, v, head_mask, causal, window=window)
    if window is not None:
        raise ValueError(f"backend={backend!r} knows no window; use 'triton', 'flash_attn', 'sdpa' or 'reference'")
    kernel = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}[backend]
    with sdpa_kernel(kernel):
        return reference.masked_attention(q, k, v, head_mask, causal)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int | None) -> Tensor:
    if find_spec("flash_attn") is None:
        raise ValueError("backend='flash_attn' needs the flash-attn package; pip install flash-attn, or use 'triton'")
    import flash_attn  # type: ignore[import-not-found,unused-ignore]

    looks_back = (-1, -1) if window is None else (window - 1, 0)  # keys before and after a query, besides its own
    if cu_seqlens is None:
        out: Tensor = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=looks_back)
        return out
    batch, time = q.shape[:2]
    rows = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * time  # documents do not cross rows
    edges = torch.cat((cu_seqlens.to(torch.int32), rows)).sort().values
    varlen: Callable[..., Any] = flash_attn.flash_attn_varlen_func
    flat = (x.reshape(batch * time, *x.shape[2:]) for x in (q, k, v))
    packed: Tensor = varlen(*flat, edges, edges, time, time, causal=causal, window_size=looks_back)
    return packed.view(q.shape)
