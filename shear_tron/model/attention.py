"""Attention on the heads of one rank, and the positions of the tokens it attends to."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import shear_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from shear_tron.architecture import Architecture, Rope
from shear_tron.model.products import products
from shear_tron.model.rope import rope_table


@dataclass(frozen=True)
class Positions:
    """Where tokens stand. ``documents``: int32 [documents + 1], the documents' ends in batch x time flattened, first 0;
    attention does not cross them and positions restart. None: each sequence is one document."""

    time: int
    cos: Tensor  # [time, turning entries of a head / 2], or [batch, time, ...] with documents
    sin: Tensor
    documents: Tensor | None = None

    @classmethod
    def of(
        cls, architecture: Architecture, time: int, documents: Tensor | None, tokens: int, device: torch.device,
        dtype: torch.dtype,
    ) -> "Positions":  # fmt: skip
        """For ``tokens`` in sequences of length ``time``; angles in (at least float32) precision of ``dtype``."""
        rope, turning = architecture.rope, int(architecture.shape.head_dim * architecture.rope.share)
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        if documents is None:
            return cls(time, *_of_sequence(rope, turning, time, device, precision))
        token = torch.arange(tokens, device=device)
        starts = documents[torch.searchsorted(documents, token, right=True) - 1]
        cos, sin = rope_table(rope, turning, token - starts, precision)
        return cls(time, cos.view(-1, time, cos.shape[-1]), sin.view(-1, time, sin.shape[-1]), documents)


@lru_cache(maxsize=8)
def _of_sequence(
    rope: Rope, turning: int, time: int, device: torch.device, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The angles of every sequence of a run: made once, not for each microbatch."""
    return rope_table(rope, turning, torch.arange(time, device=device), precision)


def attention(
    x: Tensor,
    weights: Mapping[str, Tensor],
    heads: Tensor | None,
    positions: Positions,
    head_dim: int,
    eps: float,
    turn: bool,
    window: int | None,
) -> Tensor:
    """The heads' contribution to the residual stream, without the output's bias: [tokens, hidden] -> [tokens, hidden].

    weights: a layer's, by leaf. heads: their mask [heads], None where it is folded into ``o``. turn: whether positions
    turn q and k. window: tokens that a query sees, itself included; None for all before it.
    """

    projected = products(x, weights, "q", "k", "v")
    q, k, v = (out.view(-1, positions.time, out.shape[-1] // head_dim, head_dim) for out in projected)
    if "q_norm" in weights:
        q = shear_kernels.masked_rms_norm(q, weights["q_norm"], None, eps)
        k = shear_kernels.masked_rms_norm(k, weights["k_norm"], None, eps)
    if turn:
        q, k = shear_kernels.rope(q, k, positions.cos, positions.sin)
    out = shear_kernels.masked_attention(q, k, v, heads, cu_seqlens=positions.documents, window=window)
    return F.linear(out.flatten(2).flatten(0, 1), weights["o"])
