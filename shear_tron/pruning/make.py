"""From the ``prune`` section to the way of making masks that it names."""

from collections.abc import Callable

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.pruning.config import PruneConfig
from shear_tron.pruning.constraint import Constraint
from shear_tron.pruning.gates import Gates
from shear_tron.pruning.hard_concrete import HardConcrete
from shear_tron.pruning.method import Method
from shear_tron.pruning.scored import Scored
from shear_tron.shape import Shape


def make_method(
    config: PruneConfig, source: Architecture, target: Shape, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Method:
    """The method as it is before the first step. ValueError where the target does not fit."""
    warmup, balance = config.warmup_steps, config.balance
    if config.method == "hard_concrete":
        return HardConcrete(
            Gates(source.shape, target, seed, dtype, balance), Constraint(source, target, warmup, dtype)
        )
    decay = config.decay if config.method == "fisher" else None
    if config.rotate and target.hidden == source.shape.hidden:
        raise ValueError(f"prune.rotate orders hidden dimensions, the target keeps all {target.hidden}; leave it out")
    return Scored(source, target, warmup, decay, config.batches_before, balance, dtype, config.rotate)


def read_method(config: PruneConfig, source: Architecture, target: Shape, read: Callable[[str], Tensor]) -> Method:
    """The method as a checkpoint left it. read: from a name in the checkpoint to the tensor.

    ValueError where a value is not finite.
    """
    method = make_method(config, source, target)
    for name, tensor in method.tensors().items():
        tensor.copy_(read(name))
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values; use an earlier checkpoint (--step)")
    return method
