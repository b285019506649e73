"""Runs of the command line in tests: on ranks, and what they leave."""

from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from shear_tron.checkpoint import sharded


def as_under_torchrun() -> None:
    """Let commands run on this rank, which has joined the process group already and is to stay in it."""
    from shear_tron.parallel import topology

    topology.world_size = dist.get_world_size
    topology.stop = lambda: None


def final_state(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint, by name."""
    checkpoint = sharded.latest(run)
    assert checkpoint is not None
    reader = sharded.Reader(checkpoint)
    return {name: reader.read(name) for name in reader.sizes}
