"""A run that starts where another is; across extraction, Adam's moments are cut by the indices that cut the weights.

With a schedule that spans both runs, pruning and continued pre-training are one training that gets smaller on its way.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.safetensors_stream import Writer
from shear_tron.masks import Masks
from shear_tron.parallel.agree import require_all
from shear_tron.params import params
from shear_tron.pruning.extract import extract
from shear_tron.pruning.make import read_method
from shear_tron.train import saved
from shear_tron.train.config import InitConfig
from shear_tron.train.run_folder import RunFolder

MOMENTS = "moments"  # in the folder of the run that goes on: what it starts from, while it starts
POWERS = {"exp_avg": -1, "exp_avg_sq": -2}  # of a mask's value, in a moment of what it scales


def require_pruned_to(run: str, architecture: Architecture) -> None:
    """ValueError unless ``run`` is the folder of a pruning run that ends in a model of this shape."""
    folder = RunFolder.open(run)
    if folder.config.prune is None:
        raise ValueError(f"optimizer.moments={run} is a run without masks; give the pruning run that made the model")
    target = folder.config.prune.target.shape(folder.source.shape)
    if target != architecture.shape:
        raise ValueError(
            f"optimizer.moments={run} prunes to {target}, the model is {architecture.shape}; give the run that made it"
        )


def require_same_model(init: InitConfig, architecture: Architecture) -> None:
    """ValueError unless ``init`` names a run of a model of this architecture with a checkpoint."""
    source = RunFolder.open(init.run).source
    if source != architecture:
        raise ValueError(
            f"init_from.run={init.run} trains {source.shape}, not this model's {architecture.shape}; give one that does"
        )


def start_from(init: InitConfig, parameters: dict[str, Tensor], moments: dict[str, Tensor]) -> int:
    """Fill parameters, and moments if asked for, from another run. Collective. Returns the moments' updates."""
    run = RunFolder.open(init.run)
    sharded.load(run.checkpoint, {name: p.detach() for name, p in parameters.items()})
    if not init.optimizer:
        return 0
    sharded.read_into(moments, run.checkpoint)
    return updates(run)


def go_on_with(run: str, own: Path, moments: dict[str, Tensor], is_main: bool) -> int:
    """Fill ``moments`` (``shear_tron.train.optimizer.moments``) from a pruning run. Returns its updates. Collective.

    own: the folder of this run, where the cut moments lie in between.
    """
    source, folder = RunFolder.open(run), own / MOMENTS
    problem = None
    if is_main:
        try:
            write_cut_moments(source, folder)
        except (ValueError, OSError) as error:
            problem = f"optimizer.moments={run} cannot be cut: {error}"
    require_all(problem)
    sharded.read_into(moments, folder)
    require_all(None)  # all have read
    if is_main:
        shutil.rmtree(folder)
    return updates(source)


def updates(run: RunFolder) -> int:
    """Steps of Adam that a run has made; skipped ones are none."""
    progress = saved.progress(run.checkpoint)
    return int(progress.step - progress.state["health"]["skipped"] + progress.state["updates_before"])


def write_cut_moments(run: RunFolder, folder: Path) -> None:
    """Write the moments of the dense model that ``run`` ends in, as tensors that every layout reads.

    A mask of value m makes m * w of a weight w, whose gradient is 1 / m of w's: so are the first moments, and the
    second 1 / m^2.
    """
    assert run.config.prune is not None
    source = run.source
    target = run.config.prune.target.shape(source.shape)
    reader = sharded.Reader(run.checkpoint)
    masks = read_method(run.config.prune, source, target, reader.read).decide()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = {f"adam.{each.name}.{moment}": each.size for each in params(source.resized(target)) for moment in POWERS}
    writer = Writer(folder, sizes, torch.float32, 5e9)
    for moment, power in POWERS.items():
        inverse = Masks(**{kind: torch.where(mask > 0, mask**power, 0.0) for kind, mask in masks.items()})
        for name, tensor in extract(_reading(reader, moment), inverse, source)[1]:
            writer.write(f"adam.{name}.{moment}", tensor)
    writer.close()


def _reading(reader: sharded.Reader, moment: str) -> Callable[[str], Tensor]:
    return lambda name: reader.read(f"adam.{name}.{moment}")
