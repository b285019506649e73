"""Rotation in a run: second moments of the normed streams over some batches, then the weights turned, in any layout."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.safetensors_stream import Writer
from shear_tron.data.sampler import Batches
from shear_tron.model.context import DENSE
from shear_tron.parallel import sync
from shear_tron.parallel.agree import require_all
from shear_tron.parallel.pipeline import Engine
from shear_tron.parallel.topology import Topology
from shear_tron.params import params
from shear_tron.pruning.rotate import Turned, principal_axes
from shear_tron.train.config import RunConfig
from shear_tron.train.seeing import ENTER, seeing

FOLDER = "rotated"  # in the run's folder: the turned weights, on their way to the ranks


def second_moments(engine: Engine, batches: Sequence[tuple[Tensor, Tensor]], topology: Topology) -> Tensor:
    """The sum over all norms of the mean over tokens of x x^T, x being a norm's output. float64 [hidden, hidden].

    batches: this rank's (tokens, labels). The same on all ranks, whatever the layout; on the CPU. Collective.
    """
    hidden = engine.stages[0].architecture.shape.hidden
    total = torch.zeros(hidden, hidden, dtype=torch.float64, device=topology.device)

    def see(_layer: int | None, what: str, x: Tensor) -> None:
        if what == ENTER and topology.tp_rank == 0:  # tensor-parallel ranks see the same
            wide = x.detach().double()
            total.addmm_(wide.T, wide, alpha=1 / (len(wide) * engine.count * len(batches)))

    with seeing(engine.stages, see):
        for tokens, labels in batches:
            engine.evaluate(tokens, labels, DENSE)
    return sync.sum_over_ranks(total, topology) / topology.layout.dp


def rotate(engine: Engine, batches: Batches, config: RunConfig, weights: Turned, topology: Topology) -> Tensor:
    """Turn the weights of a model to the principal axes of its next batches. Returns each axis's energy. Collective.

    weights: the model's, norms absorbed and not yet turned. One rank turns them, a tensor at a time, and writes them
    where all read their parts.
    """
    assert config.prune is not None
    stages, run = engine.stages, Path(config.run)
    moments = second_moments(engine, batches.take(config.prune.calibration_batches, topology.device), topology)
    energy, axes = principal_axes(moments)
    folder, problem = run / FOLDER, None
    if topology.is_main:
        try:
            write_turned(Turned(weights.weights, weights.source, axes.to(topology.device)), folder)
        except (ValueError, OSError) as error:
            problem = f"the turned weights cannot be written: {error}"
    require_all(problem)
    sharded.read_into({name: p.detach() for stage in stages for name, p in stage.named_parameters()}, folder)
    require_all(None)  # all have read
    if topology.is_main:
        shutil.rmtree(folder)
    return energy


def write_turned(weights: Turned, folder: Path) -> None:
    """As tensors that every layout reads."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parameters = list(params(weights.architecture))
    writer = Writer(folder, {each.name: each.size for each in parameters}, torch.float32, 5e9)
    for each in parameters:
        writer.write(each.name, weights.read(each.name))
    writer.close()
