"""Data parallelism: weights are read, cut for this rank and handed to FSDP2, one layer at a time."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shear_tron.model.transformer import Transformer
from shear_tron.parallel.tensor import TensorParallel
from shear_tron.parallel.topology import Topology
from shear_tron.params import by_leaf


class Weights(Protocol):
    """Where the weights of a model come from, by our names."""

    def read(self, name: str) -> Tensor: ...

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor: ...


def shard(
    stage: Transformer, weights: Weights, topology: Topology, dtype: torch.dtype, compute: torch.dtype
) -> Transformer:
    """Fill ``stage`` (built on the meta device) from ``weights`` and share it out over the data-parallel ranks.

    Never more than one layer's tensor-parallel part is whole in memory. Parameters are stored in ``dtype``; forward and
    backward run in ``compute``, gradients are reduced in ``dtype``.
    """
    split = stage.split
    assert isinstance(split, TensorParallel)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=dtype, cast_forward_inputs=False)
    # A pipeline comes back to each layer once a microbatch, so there it stays gathered until the step's end.
    gathered = topology.layout.pp > 1

    def fill(module: nn.Module, prefix: str) -> None:
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            row = by_leaf(stage.architecture)[leaf]
            if row.cut_axis is None or split.size == 1:
                part = weights.read(prefix + leaf)
            else:
                start, stop = split.bounds(row, tuple(parameter.shape))
                part = weights.read_slice(prefix + leaf, row.cut_axis, start, stop)
            part = part.to(topology.device, dtype).contiguous()
            module.register_parameter(leaf, split.parameter(part, row))

    for index, layer in stage.layers.items():
        fill(layer, f"layers.{index}.")
        fully_shard(layer, mesh=topology.fsdp_mesh, mp_policy=policy, reshard_after_forward=not gathered)
    fill(stage, "")
    fully_shard(stage, mesh=topology.fsdp_mesh, mp_policy=policy, reshard_after_forward=False)
    assert isinstance(stage, FSDPModule)
    return stage
