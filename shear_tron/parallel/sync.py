"""Sums over ranks that no one part of the engine sees: masks, tied embeddings, the gradient norm, metrics.

One rule covers replicated tensors: *sum where ranks saw parts, then mean over data*.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from shear_tron.model.transformer import Transformer
from shear_tron.parallel.topology import Topology
from shear_tron.params import by_leaf


def sum_parts_mean_data(tensors: Sequence[Tensor], topology: Topology) -> None:
    """Replace each rank's share of the gradients of replicated tensors by the gradient, in one flat all-reduce.

    Tensor- and pipeline-parallel ranks saw parts (``Split.shared`` sees to it), data-parallel ranks saw other data.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(topology.device)
    dist.all_reduce(flat)
    flat /= topology.layout.dp
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def sum_tied(stages: Iterable[Transformer], topology: Topology) -> None:
    """Add up the gradients of the two copies of a tied embedding that a pipeline keeps at its ends."""
    if topology.tied_embedding_group is None:
        return
    for stage in stages:
        if stage.architecture.shape.tied and (stage.is_first or stage.is_last):
            assert isinstance(stage.embed.grad, DTensor)
            dist.all_reduce(stage.embed.grad.to_local(), group=topology.tied_embedding_group)


def counted_once(stages: Iterable[Transformer]) -> dict[str, nn.Parameter]:
    """This rank's parameters by name, less the last stage's copy of a tied embedding."""
    return {
        name: parameter
        for stage in stages
        for name, parameter in stage.named_parameters()
        if not (name == "embed" and not stage.is_first)
    }


def clip(stages: Sequence[Transformer], limit: float, topology: Topology) -> Tensor:
    """Scale all gradients such that their global norm is at most ``limit``. Returns the norm before, 0-d."""
    cut: list[Tensor] = []
    whole: list[Tensor] = []
    table = by_leaf(stages[0].architecture)
    for name, parameter in counted_once(stages).items():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor)
            row = table[name.rsplit(".", 1)[-1]]
            (whole if row.cut_axis is None else cut).append(parameter.grad.to_local())
    square = get_total_norm(cut).square() + get_total_norm(whole).square() / topology.layout.tp
    square = square.to(topology.device)
    dist.all_reduce(square)  # each rank's own part once; replicas counted and divided out
    norm = (square / topology.layout.replicate).sqrt()
    clip_grads_with_norm_([p for stage in stages for p in stage.parameters()], limit, norm)
    return norm


def sum_over_data(values: Tensor, topology: Topology) -> Tensor:
    """Sum of ``values`` over the data-parallel ranks. In place."""
    for axis in ("replicate", "shard"):
        dist.all_reduce(values, group=topology.mesh.get_group(axis))
    return values


def sum_over_parts(values: Tensor, topology: Topology) -> Tensor:
    """Sum of ``values`` over the tensor- and pipeline-parallel ranks that work on the same data. In place."""
    for axis in ("pp", "tp"):
        dist.all_reduce(values, group=topology.mesh.get_group(axis))
    return values


def sum_over_ranks(values: Tensor, topology: Topology) -> Tensor:
    """Sum of ``values`` over all ranks, on the CPU; waits for them."""
    values = values.to(topology.device)
    dist.all_reduce(values)
    return values.cpu()
