"""Products of several weights with one input: at once, where a step has gathered the weights into one buffer."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shear_tron.keep import KeepLayer
from shear_tron.params import Row

READ_ONE_INPUT = (("q", "k", "v"), ("gate", "up"))


def together(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of a layer's matrices that read one input, in groups; all of a group have a bias, or none."""
    by_leaf = {row.leaf: row for row in rows}
    groups = [leaves for leaves in READ_ONE_INPUT if by_leaf.keys() >= set(leaves)]
    alike = [leaves for leaves in groups if len({f"{leaf}_bias" in by_leaf for leaf in leaves}) == 1]
    return [[by_leaf[leaf] for leaf in leaves] for leaves in alike]


def gathered(weights: Mapping[str, Tensor], keep: KeepLayer, group: Sequence[Row]) -> dict[str, Tensor]:
    """The kept parts of a group's weights by leaf, views of one buffer, and the buffer, which ``products`` looks for;
    nothing where one of them is kept whole: it would have to be copied."""
    if not all(map(keep.cuts, group)):
        return {}
    leaves = [row.leaf for row in group]
    buffer, counts = keep.select_joined([weights[leaf] for leaf in leaves], group)
    return dict(zip(leaves, torch.split(buffer, counts), strict=True)) | {_name(leaves): buffer}


def _name(leaves: Sequence[str]) -> str:
    """Of the buffer that weights lie in, among a layer's weights."""
    return "+".join(leaves)


def products(x: Tensor, weights: Mapping[str, Tensor], *leaves: str) -> tuple[Tensor, ...]:
    """``x`` [tokens, hidden] times each of the weights called ``leaves``, biases added: [tokens, rows of it] each.

    weights: a layer's, by leaf, with the buffer that these lie in, if any (``gathered``).
    """
    joined, biases = weights.get(_name(leaves)), [weights.get(f"{leaf}_bias") for leaf in leaves]
    if joined is None:
        return tuple(F.linear(x, weights[leaf], bias) for leaf, bias in zip(leaves, biases, strict=True))
    given = [bias for bias in biases if bias is not None]
    sizes, bias = [len(weights[leaf]) for leaf in leaves], torch.cat(given) if given else None
    return cast(tuple[Tensor, ...], _Products.apply(x, joined, bias, sizes))  # type: ignore[no-untyped-call]


class _Products(torch.autograd.Function):
    """One product forward. Backward the gradients come one by one: their products add up within the matrix kernels,
    in place, where autograd would join the gradients first, in a pass over all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return torch.split(F.linear(x, weight, bias), sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dweight = torch.mm(grads[0], weight[: ctx.sizes[0]]), torch.empty_like(weight)
        parts = zip(grads, torch.split(weight, ctx.sizes), torch.split(dweight, ctx.sizes), strict=True)
        for number, (grad, part, dpart) in enumerate(parts):
            if number:
                torch.addmm(dx, grad, part, out=dx)  # counted as operations, which `addmm_` is not
            torch.mm(grad.t(), x, out=dpart)
        return dx, dweight, torch.cat([grad.sum(0) for grad in grads]) if ctx.needs_input_grad[2] else None, None
