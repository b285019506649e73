"""From a run's checkpoint to a model that others open: the dense model of a pruning run, or a trained model."""

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.atomic import atomic
from shear_tron.checkpoint.model_folder import Form, read_architecture, require_form, write_model
from shear_tron.checkpoint.serving import objections
from shear_tron.params import count, params
from shear_tron.progress import bar
from shear_tron.pruning.extract import extract as dense_model
from shear_tron.pruning.make import read_method
from shear_tron.pruning.reached import missed, told
from shear_tron.train.card import card, publish
from shear_tron.train.handover import hand_over, require_samples
from shear_tron.train.run_folder import RunFolder


def extract(run: RunFolder, output: str, form: Form, samples: int = 0) -> str:
    """Write the dense model that the decided masks of a pruning run leave. Returns a sentence about it.

    The masks keep exactly the target's counts in every layer; their values are folded into the weights (DESIGN in
    docs/architecture.md). samples: how many of the run's next samples go along, for nanotron. Raises ValueError where
    ``run`` is not a pruning run, ``output`` exists, or the format has no such model.
    """
    if run.config.prune is None:
        raise ValueError(f"{run.path} is a training run without masks; use `shear-tron export {run.path} {output}`")
    source = run.source
    target = run.config.prune.target.shape(source.shape)
    reader = sharded.Reader(run.checkpoint)
    method = read_method(run.config.prune, source, target, reader.read)
    dense, tensors = dense_model(reader.read, method.decide(), source)
    said = _write(run, output, dense, source, tensors, form, samples)
    short = missed(method.expected(), source.shape, target)
    warning = f"; WARNING: {told(short)}; train longer before trusting this model" if short else ""
    return f"{output}: {count(dense):,} of {count(source):,} parameters: {dense.shape}{said}{warning}"


def export(run: RunFolder, output: str, form: Form, samples: int = 0) -> str:
    """Write the weights of a (continued) pre-training run. Returns a sentence about it."""
    if run.config.prune is not None:
        raise ValueError(f"{run.path} is a pruning run; use `shear-tron extract {run.path} {output}`")
    architecture = read_architecture(run.model)
    reader = sharded.Reader(run.checkpoint)
    tensors = ((param.name, reader.read(param.name)) for param in params(architecture))
    said = _write(run, output, architecture, architecture, tensors, form, samples)
    return f"{output}: {count(architecture):,} parameters: {architecture.shape}{said}"


def _write(
    run: RunFolder,
    output: str,
    architecture: Architecture,
    source: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    form: Form,
    samples: int,
) -> str:
    verb = "export" if run.config.prune is None else "extract"
    require_form(architecture, form)
    if Path(output).resolve().is_relative_to((run.path / sharded.FOLDER).resolve()):
        raise ValueError(f"{output} is among the checkpoints of {run.path}; write somewhere else")
    given = shown(tensors, architecture, output)
    if samples:
        require_samples(run, architecture, form, samples)
        return "; " + hand_over(run, Path(output), architecture, given, form, samples)
    if form.format != "huggingface":
        said = write_model(output, architecture, given, form, run.tokenizer)
        return f"; {said}" if said else ""
    text = card(run, Path(output).name, architecture, source, f"shear-tron {verb} {run.path} {output}")
    with atomic(output) as partial:
        write_model(partial, architecture, given, form, run.tokenizer)
        publish(run, partial, text)
    return "".join(f"; {objection}" for objection in objections(architecture))


def shown(
    tensors: Iterable[tuple[str, Tensor]], architecture: Architecture, output: str
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with a bar of parameters."""
    with bar(f"writing {output}", count(architecture), "parameters", unit_scale=True) as written:
        for name, tensor in tensors:
            yield name, tensor
            written.update(prod(tensor.shape))
