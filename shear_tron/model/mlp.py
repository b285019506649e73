"""The feed-forward part on the columns of one rank."""

from collections.abc import Mapping

import shear_kernels
import torch.nn.functional as F
from torch import Tensor

from shear_tron.model.products import products


def mlp(x: Tensor, weights: Mapping[str, Tensor], ffn: Tensor | None) -> Tensor:
    """The columns' contribution to the residual stream, without the output's bias: [tokens, hidden] -> the same.

    weights: a layer's, by leaf; with ``gate`` it is SwiGLU, without it GELU. ffn: the columns' mask [ffn], None where
    it is folded into ``down``.
    """
    if "gate" in weights:
        gate, up = products(x, weights, "gate", "up")
        inner = shear_kernels.masked_swiglu(gate, up, ffn)
    else:
        (up,) = products(x, weights, "up")
        inner = shear_kernels.masked_gelu(up, ffn)
    return F.linear(inner, weights["down"])
