"""Gradients that autograd would not give: columns put back in place, a layer left out whole."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scatter_columns(x: Tensor, columns: Tensor | None, width: int) -> Tensor:
    """The inverse of selecting ``columns`` of [n, width]: x in its columns, zeros in the others. Differentiable."""
    return x if columns is None else x.new_zeros(x.shape[0], width).index_copy(1, columns, x)


def skip_layer(x: Tensor, weights: list[Tensor]) -> Tensor:
    """``x`` itself, with gradients of zero for ``weights``: a layer left out whole.

    FSDP waits for a gradient of every weight it gathered, and other ranks may not have left the layer out.
    """
    return cast(Tensor, _SkipLayer.apply(x, *weights))  # type: ignore[no-untyped-call]


class _SkipLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = [(weight.shape, weight.dtype) for weight in weights]  # not they: FSDP may have let them go
        return x.clone()  # FSDP warns of modules that return views

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(size, dtype=dtype) for size, dtype in ctx.weights)
