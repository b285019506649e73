"""Attention without a gate by the best library at hand, then the gate; and which backend a device gets.

    "sdpa"          torch's scaled_dot_product_attention, torch's own choice of kernel
    "sdpa_flash"    the same, its FlashAttention-2 kernel only
    "sdpa_cudnn"    the same, its cuDNN kernel only
    "varlen"        torch.nn.attention.varlen: documents and windows
    "flash_attn"    the flash-attn package (FlashAttention-2): documents and windows
    "flash_attn_3"  the flash_attn_interface package (FlashAttention-3, Hopper): documents and windows

``PREFERRED`` says what each compute capability gets, by what its makers publish; ``MEASURED`` goes before it, by what
``kernels/bench/run.py`` measured on a device. Both may be assigned to. Where a gate comes with the call the masked
kernel runs: it skips closed heads, and the others need a pass over their output (fold the gate into the output
projection instead, see ``shear_kernels.fuses_head_gates``).
"""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shear_kernels import reference

AttentionBackend = Literal[
    "triton", "reference", "sdpa", "sdpa_flash", "sdpa_cudnn", "varlen", "flash_attn", "flash_attn_3"
]

PREFERRED: dict[tuple[int, int], tuple[AttentionBackend, ...]] = {
    (9, 0): ("sdpa_cudnn", "flash_attn_3", "varlen", "triton"),
    (8, 0): ("flash_attn", "sdpa_flash", "varlen", "triton"),
}
"""Compute capability -> backends, the first that can serve a call is taken; any other device gets Triton. On Hopper
FlashAttention-2, and our kernel with it, leaves half of the matrix units idle (arXiv 2407.08608); nothing of this was
measured here."""

MEASURED: dict[tuple[str, bool], AttentionBackend] = {}
"""(device name, gated) -> fastest backend, forward and backward together, all heads open, with a gate or without. Empty
until a GPU has been measured."""

OPS = frozenset(
    {
        "shear_kernels::attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
    }
)
"""The torch ops in which backends attend, forward: what selective checkpointing should save."""

_PACKAGES = {"triton": "triton", "flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface"}
_SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
_EDGES = ("triton", "reference", "varlen", "flash_attn", "flash_attn_3")


def can_serve(backend: AttentionBackend, dtype: torch.dtype, head_dim: int, edges: bool) -> bool:
    """Whether ``backend`` is installed and takes such a call; ``edges``: of documents or of a window."""
    if edges and backend not in _EDGES:
        return False
    if backend in _PACKAGES and find_spec(_PACKAGES[backend]) is None:
        return False
    if backend == "triton":
        return dtype != torch.float64 and head_dim <= 128
    if backend in ("sdpa", "reference"):
        return True
    if backend == "sdpa_cudnn" and not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if backend == "varlen" and not _have_varlen():
        return False
    widest = 128 if backend == "sdpa_cudnn" else 256
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= widest


def _have_varlen() -> bool:
    """With windows and grouped queries: not in every release of torch that has the module."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, gated: bool, edges: bool) -> AttentionBackend:
    """The backend of a CUDA device: the measured one, else the first preferred for its capability that can serve."""
    order: list[AttentionBackend] = []
    if MEASURED and (name := torch.cuda.get_device_name(device), gated) in MEASURED:
        order.append(MEASURED[name, gated])
    if not gated:
        order += PREFERRED.get(torch.cuda.get_device_capability(device), ())
    order.append("triton")
    return next((b for b in order if can_serve(b, dtype, head_dim, edges)), "reference")


# What torch.compiler.assume_constant_result sets, without the import of the whole compiler that it brings.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_mask: Tensor | None,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    backend: AttentionBackend,
    strict: bool = True,
) -> Tensor:
    """``reference.masked_attention`` with its softmax attention computed by ``backend``; same shapes and dtypes. Not
    ``strict``: torch's other kernels may step in for the one of torch that was chosen."""
    if (cu_seqlens is not None or window is not None) and backend not in _EDGES:
        raise ValueError(f"backend={backend!r} knows no document boundaries and no windows; use one of {_EDGES}")
    if backend in _SDPA:
        kernels = [_SDPA[backend]]
        if not strict:
            kernels += [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(kernels, set_priority=True):
            return reference.masked_attention(q, k, v, head_mask, causal)
    if backend == "sdpa":
        return reference.masked_attention(q, k, v, head_mask, causal)
    if backend in _PACKAGES and find_spec(_PACKAGES[backend]) is None:
        raise ValueError(f"backend={backend!r} needs the package {_PACKAGES[backend]}; install it, or use 'triton'")
    flash = {"flash_attn": _flash_attn, "flash_attn_3": _flash_attn_3, "varlen": _varlen}[backend]
    looks_back = (-1, -1) if window is None else (window - 1, 0)  # keys before and after a query, besides its own
    out = flash(
        q, k, v, causal, None if backend != "varlen" and cu_seqlens is None else _ends(q, cu_seqlens), looks_back
    )
    return out if head_mask is None else (out.float() * head_mask[:, None]).to(q.dtype)


def _ends(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Ends of documents and of rows, which documents do not cross, in the flattened batch * time axis."""
    batch, time = q.shape[:2]
    rows = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * time
    return rows if cu_seqlens is None else torch.cat((cu_seqlens.to(torch.int32), rows)).sort().values


def _packed(op: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, ends: Tensor, **options: Any) -> Tensor:
    """``op`` over all rows laid end to end."""
    time = q.shape[1]
    out = op(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, time, time, **options)
    packed: Tensor = out[0] if isinstance(out, tuple) else out
    return packed.view(q.shape)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, ends: Tensor | None, window: tuple[int, int]) -> Tensor:
    import flash_attn  # type: ignore[import-not-found,unused-ignore]

    if ends is not None:
        return _packed(flash_attn.flash_attn_varlen_func, q, k, v, ends, causal=causal, window_size=window)
    out: Tensor = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window)
    return out


def _flash_attn_3(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, ends: Tensor | None, window: tuple[int, int]
) -> Tensor:
    import flash_attn_interface  # type: ignore[import-not-found,unused-ignore]

    if ends is not None:
        return _packed(flash_attn_interface.flash_attn_varlen_func, q, k, v, ends, causal=causal, window_size=window)
    out = flash_attn_interface.flash_attn_func(q, k, v, causal=causal, window_size=window)
    attended: Tensor = out[0] if isinstance(out, tuple) else out  # early releases return the sums too
    return attended


def _varlen(q: Tensor, k: Tensor, v: Tensor, causal: bool, ends: Tensor | None, window: tuple[int, int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert ends is not None
    window = (-1, 0) if causal and window == (-1, -1) else window
    return _packed(varlen_attn, q, k, v, ends, window_size=window, enable_gqa=q.shape[2] != k.shape[2])
