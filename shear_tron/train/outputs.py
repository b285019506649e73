"""From a run's checkpoint to a Hugging Face folder: the dense model of a pruning run, or a trained model as it is."""

from dataclasses import replace
from pathlib import Path

import torch

from shear_tron.checkpoint import huggingface, sharded
from shear_tron.config import load
from shear_tron.params import count, params
from shear_tron.pruning.extract import extract as dense_model
from shear_tron.pruning.gates import Gates
from shear_tron.train.config import RunConfig
from shear_tron.train.plan import CONFIG


def extract(run: Path, output: str, step: int | None, dtype: str) -> str:
    """Write the dense model that the decided masks of a pruning run leave. Returns a sentence about it.

    The masks keep exactly the target's counts in every layer; their values are folded into the weights (DESIGN in
    docs/architecture.md). Raises ValueError where ``run`` is not a pruning run or ``output`` exists.
    """
    config, checkpoint = _open(run, step)
    if config.prune is None:
        raise ValueError(f"{run} is a training run without masks; use `shear-tron export {run} {output}`")
    source = huggingface.read_architecture(config.model)
    target = config.prune.target.shape(source.shape)
    gates = Gates(source.shape, target, balance=config.prune.balance)
    logits = {kind: checkpoint.read(f"gates.{kind}") for kind in gates.logits}
    for kind, values in logits.items():
        if not bool(values.isfinite().all()):
            raise ValueError(f"gates.{kind} holds NaN or infinite values in {run}; use an earlier checkpoint (--step)")
    gates.load_state_dict(logits)
    shape, tensors = dense_model(checkpoint.read, gates.decide(), source.shape)
    huggingface.write(
        output, replace(source, shape=shape), tensors, dtype=getattr(torch, dtype), tokenizer_from=config.model
    )
    return f"{output}: {count(shape):,} of {count(source.shape):,} parameters, {shape}"


def export(run: Path, output: str, step: int | None, dtype: str) -> str:
    """Write the weights of a (continued) pre-training run. Returns a sentence about it."""
    config, checkpoint = _open(run, step)
    if config.prune is not None:
        raise ValueError(f"{run} is a pruning run; use `shear-tron extract {run} {output}`")
    architecture = huggingface.read_architecture(config.model)
    tensors = ((param.name, checkpoint.read(param.name)) for param in params(architecture.shape))
    huggingface.write(output, architecture, tensors, dtype=getattr(torch, dtype), tokenizer_from=config.model)
    return f"{output}: {count(architecture.shape):,} parameters, {architecture.shape}"


def _open(run: Path, step: int | None) -> tuple[RunConfig, sharded.Reader]:
    checkpoint = sharded.latest(run) if step is None else sharded.path(run, step)
    if checkpoint is None or not checkpoint.exists():
        have = ", ".join(path.name for path in sharded.checkpoints(run)) or "none"
        raise ValueError(f"{run} has no checkpoint{'' if step is None else f' of step {step}'}; it has {have}")
    return load(RunConfig, run / CONFIG), sharded.Reader(checkpoint)
