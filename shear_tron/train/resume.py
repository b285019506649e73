"""Where a trainer begins: at its newest checkpoint, at another run's, or back at an earlier one past a bad batch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shear_tron.checkpoint import sharded
from shear_tron.data.sampler import Batches
from shear_tron.parallel.agree import require_all
from shear_tron.parallel.topology import rank
from shear_tron.train import saved
from shear_tron.train.moments import go_on_with, start_from
from shear_tron.train.optimizer import moments, set_updates, start_moments

if TYPE_CHECKING:
    from shear_tron.train.loop import Trainer


def resume(trainer: "Trainer") -> int | None:
    """Go on from the newest checkpoint. Returns its step; None where there is none. Collective."""
    checkpoint = trainer.checkpointer.newest()
    seen = checkpoint is None or (checkpoint / sharded.PROGRESS).is_file()
    require_all(None if seen else f"rank {rank()} has no {checkpoint}; give a run folder that all ranks share")
    if checkpoint is None:
        named: dict[str, Tensor] = {name: p for stage in trainer.stages for name, p in stage.named_parameters()}
        tensors = moments(trainer.optimizer, named)
        if earlier := trainer.config.optimizer.moments:
            trainer.updates_before = go_on_with(earlier, trainer.run, tensors, trainer.topology.is_main)
        elif start := trainer.config.init_from:
            trainer.updates_before = start_from(start, named, tensors)
        set_updates(trainer.optimizer, trainer.updates_before)
        return None
    trainer.sampler.restore(restore(trainer, checkpoint)["sampler"])
    return trainer.step


def go_back(trainer: "Trainer", checkpoint: Path, loss: float, batches: Batches) -> None:
    """To a checkpoint, from a step whose loss jumped, and on with the samples after that step's. Collective."""
    at, last = trainer.step + 1, batches.state()["number"] - 1
    samples = restore(trainer, checkpoint)["sampler"]["number"], last
    assert trainer.mixture is not None
    batches.set_weights(trainer.mixture.weights)
    trainer.log.go_back(at, trainer.step, samples, loss)
    trainer.spikes.go_back(trainer.step, samples)


def restore(trainer: "Trainer", checkpoint: Path) -> dict[str, Any]:
    """Everything but the place in the data, as it was saved. Returns what was saved beside tensors. Collective."""
    progress = saved.progress(checkpoint)
    trainer.step, state = progress.step, progress.state
    trainer.updates_before = state["updates_before"]
    trainer.health.restore(state["health"])
    trainer.spikes.restore(state.get("losses", []))
    updates = trainer.step - trainer.health.skipped
    start_moments(trainer.optimizer, trainer.updates_before + updates)
    if trainer.pruner:
        trainer.pruner.begin_at(updates)
    sharded.load(checkpoint, trainer.tensors())
    trainer.mixture = trainer.mixture_from(state["references"])
    if "data.weights" not in trainer.changed:
        trainer.mixture.restore(state["mixture"])
    return state
