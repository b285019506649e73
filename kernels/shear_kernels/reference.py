"""The definition of every op, in plain PyTorch: what the fused kernels must equal.

Read this file to know what an op computes. Masks are gates in [0, 1]; ``None`` means all ones and costs nothing.
Arithmetic runs in the inputs' precision, or float32 where the inputs are 16 bit; results return in the inputs' dtype.
Every function is differentiable in every tensor argument.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """``x`` in float32 if it has 16 bits, else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_mask: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention with one gate per query head: ``softmax(q k^T / sqrt(head_dim)) v * head_mask``.

    q: [batch, time, heads, head_dim]; k, v: [batch, time, kv_heads, head_dim], each key-value head serving
    ``heads / kv_heads`` consecutive query heads. head_mask: [heads]. cu_seqlens: [documents + 1] int32, ends of
    documents in the flattened batch * time axis, first entry 0: attention does not cross them. window: query i sees
    the keys j with i - window < j <= i, as in Hugging Face's Mistral. Returns [batch, time, heads, head_dim].
    """
    heads = q.shape[2]
    seen = None if cu_seqlens is None and window is None else _seen(q, causal, cu_seqlens, window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        is_causal=causal and seen is None,
        enable_gqa=k.shape[2] != heads,
    ).transpose(1, 2)
    return out if head_mask is None else (widen(out) * head_mask[:, None]).to(q.dtype)


def _seen(q: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int | None) -> Tensor:
    """[batch or 1, 1, time, time]: whether a query (next to last axis) sees a key (last)."""
    batch, time = q.shape[:2]
    seen = torch.ones(1, 1, time, time, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if window is not None:
        seen = seen.triu(1 - window)
    if cu_seqlens is not None:
        token = torch.arange(batch * time, device=q.device)
        document = torch.bucketize(token, cu_seqlens[1:].to(token.dtype), right=True).view(batch, 1, 1, time)
        seen = seen & (document.transpose(2, 3) == document)
    return seen


def masked_swiglu(gate: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * mask``. gate, up: [..., ffn]; mask: [ffn]. Returns [..., ffn]."""
    out = F.silu(widen(gate)) * widen(up)
    return (out if mask is None else out * mask).to(gate.dtype)


def masked_gelu(x: Tensor, mask: Tensor | None = None, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """``gelu(x) * mask``. x: [..., ffn]; mask: [ffn]; approximate: as in ``F.gelu``. Returns [..., ffn]."""
    out = F.gelu(widen(x), approximate=approximate)
    return (out if mask is None else out * mask).to(x.dtype)


def masked_rms_norm(x: Tensor, weight: Tensor, hidden_mask: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Root-mean-square norm over the kept width: ``x / sqrt(sum(x^2) / width + eps) * weight * hidden_mask``.

    x: [..., hidden], already zero where hidden_mask is; weight, hidden_mask: [hidden]. ``width`` is the number of
    entries of hidden_mask that are not zero, so the masked norm is the norm of the model that lacks the others.
    Returns [..., hidden].
    """
    wide = widen(x)
    if hidden_mask is None:
        mean_square = wide.square().sum(-1, keepdim=True) / x.shape[-1]
        scale = widen(weight)
    else:
        mean_square = wide.square().sum(-1, keepdim=True) / (hidden_mask != 0).sum().clamp(min=1)
        scale = widen(weight) * hidden_mask
    return (wide * torch.rsqrt(mean_square + eps) * scale).to(x.dtype)


def masked_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, hidden_mask: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer norm over the kept width: ``((x - mean) / sqrt(variance + eps) * weight + bias) * hidden_mask``.

    x: [..., hidden], already zero where hidden_mask is; weight, bias, hidden_mask: [hidden]. Mean and variance (the
    mean square distance from the mean) are over the entries that hidden_mask keeps, those where it is not zero, so the
    masked norm is the norm of the model that lacks the others. Closed entries get no gradient. Returns [..., hidden].
    """
    width = x.shape[-1] if hidden_mask is None else (hidden_mask != 0).sum().clamp(min=1)
    # A node of its own either way, so that the gradients of x add up in one order, and ones are None to the bit.
    kept = widen(x).view_as(x) if hidden_mask is None else widen(x).where(hidden_mask != 0, 0)
    centred = kept - kept.sum(-1, keepdim=True) / width
    if hidden_mask is not None:
        centred = centred.where(hidden_mask != 0, 0)
    out = centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / width + eps) * widen(weight)
    out = out if bias is None else out + widen(bias)
    return (out if hidden_mask is None else out * hidden_mask).to(x.dtype)


def gated_residual(
    residual: Tensor, branch: Tensor, hidden_mask: Tensor | None = None, layer_gate: Tensor | None = None
) -> Tensor:
    """``residual + branch * layer_gate * hidden_mask``. residual, branch: [..., hidden]; hidden_mask: [hidden];
    layer_gate: 0-d. Returns [..., hidden]."""
    if hidden_mask is None and layer_gate is None:
        return (residual + branch).to(residual.dtype)  # 16-bit sums round once as well
    out = widen(branch)
    if layer_gate is not None:
        out = out * layer_gate
    if hidden_mask is not None:
        out = out * hidden_mask
    return (widen(residual) + out).to(residual.dtype)


def add_rms_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    hidden_mask: Tensor | None = None,
    layer_gate: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``gated_residual`` and the ``masked_rms_norm`` of its result, together: returns (new residual, normed)."""
    stream = gated_residual(residual, branch, hidden_mask, layer_gate)
    return stream, masked_rms_norm(stream, weight, hidden_mask, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, half-rotation convention of Hugging Face's LLaMA.

    q: [batch, time, heads, head_dim]; k: [batch, time, kv_heads, head_dim]; cos, sin: [time, rotary / 2] (or
    [batch, time, rotary / 2] where positions differ by row). The first ``rotary`` entries of each head turn, all of
    them in LLaMA; the others pass as they are (GPT-NeoX's rotary_pct). Returns (q, k) rotated.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # broadcast over heads
    half = cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        wide = widen(x)
        first, second = wide[..., :half], wide[..., half : 2 * half]
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat((*turned, wide[..., 2 * half :]), dim=-1).to(x.dtype)

    return turn(q), turn(k)


def vocab_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token against a whole LM head, with all logits in memory at once.

    x: [tokens, hidden]; weight: [vocab, hidden]; labels: [tokens] int64, negative where the token does not count.
    Returns [tokens] in float32 (float64 for float64 inputs), 0 where the label is negative.
    """
    logits = widen(x) @ widen(weight).t()
    return F.cross_entropy(logits, labels.where(labels >= 0, -100), reduction="none", ignore_index=-100)


def select(
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None = None,
    dtype: torch.dtype | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """The kept rows and columns of a weight: ``weight[rows][:, columns]`` in ``dtype`` (the weight's by default), its
    rows scaled by row_scale and its columns by column_scale, one number for each that is kept.

    weight: [n] or [n, m]; rows, columns: int64 indices without repetition, None for all. The gradient of the weight is
    zero but for the kept entries.
    """
    part = weight if rows is None else weight[rows]
    part = part if columns is None else part[:, columns]
    return scaled(part, row_scale, column_scale).to(dtype or weight.dtype)


def select_joined(
    weights: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    columns: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``select`` of weights [n, m] of one width m, the parts one under another. rows: those kept of each."""
    return torch.cat([select(weight, kept, columns, dtype) for weight, kept in zip(weights, rows, strict=True)])


def require_indices(name: str, kept: Tensor | None) -> None:
    """ValueError where ``kept`` is no list of units."""
    if kept is not None and (kept.dtype != torch.int64 or kept.dim() != 1):
        raise ValueError(f"{name}s is {kept.dtype} of size {list(kept.shape)}; use int64 indices [kept]")


def scaled(part: Tensor, row_scale: Tensor | None, column_scale: Tensor | None) -> Tensor:
    """``part`` [n] or [n, m] with its rows times row_scale [n] and its columns times column_scale [m], in at least
    float32; itself where both are None."""
    if row_scale is not None:
        part = widen(part) * widen(row_scale).view(-1, *(1,) * (part.dim() - 1))
    if column_scale is not None:
        part = widen(part) * widen(column_scale)
    return part
