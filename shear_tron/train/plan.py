"""Everything that can be known, and can be wrong, before a rank starts: what `show` prints and `train` relies on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import FiniteFloat, TypeAdapter
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.huggingface_config import architecture_config
from shear_tron.checkpoint.model_folder import Model, is_nanotron, open_model, read_architecture
from shear_tron.config import ConfigError, Problems
from shear_tron.data.manifest import Manifest
from shear_tron.data.mixture import Mixture
from shear_tron.data.tokens import document_ends
from shear_tron.parallel.topology import Layout, choose_device
from shear_tron.pruning.make import make_method
from shear_tron.pruning.rotate import Turned
from shear_tron.reading import in_one_line, parse_yaml, read_text
from shear_tron.shape import Shape
from shear_tron.train import saved, viewers
from shear_tron.train.cache import Cache
from shear_tron.train.config import RunConfig
from shear_tron.train.drawn import require_cached
from shear_tron.train.moments import require_pruned_to, require_same_model
from shear_tron.train.samples import mixture_of, sampler_of


@dataclass(frozen=True)
class Plan:
    """A run that fits together."""

    config: RunConfig
    architecture: Architecture
    target: Shape | None  # of pruning
    layout: Layout

    @property
    def microbatches(self) -> int:
        """In each data-parallel rank's share of a batch."""
        return self.config.train.batch // self.config.train.micro_batch // self.layout.dp


@dataclass(frozen=True)
class Inputs:
    """What a run reads, found to be whole and to belong together."""

    weights: Model | Turned
    manifest: Manifest
    names: tuple[str, ...]  # of domains, in the order in which the sampler knows them
    proportions: tuple[float, ...]  # starting weights
    references: dict[str, float] | None  # losses of the domains; None: measured from the model, or none wanted
    teacher: Model | None = None  # to learn from, or to fill a cache with
    cache: Cache | None = None  # of a teacher, to learn from instead

    def documents(self, config: RunConfig) -> Callable[[Tensor], Tensor] | None:
        """From token ids to where documents end, for an ``Engine``; None where a sequence is one document."""
        if not config.data.document_masking:
            return None
        return partial(document_ends, separator=self.manifest.separator, bos=self.manifest.bos)


def plan(config: RunConfig, world: int, architecture: Architecture | None = None) -> Plan:
    """Check sizes against each other. Of the model, only its sizes are read. Raises ValueError in one line.

    architecture: of a model that is yet to be made; default: that of ``config.model``.
    """
    architecture = config.source(architecture or read_architecture(config.model))
    problems, target, layout = Problems(), None, Layout()
    with problems:
        if config.prune is None and not config.train.steps:
            raise ConfigError("train.steps=0 is for choosing units with a `prune` section; use 1 or more steps")
        if config.prune is not None:
            target = config.prune.target.shape(architecture.shape)
            make_method(config.prune, architecture, target, config.train.seed)  # can be made
            architecture_config(architecture.resized(target), torch.float32)  # transformers will open the result
    with problems:
        _require_steps(config)
    if config.train.compile and (config.prune is not None or config.train.activation_checkpointing == "selective"):
        problems.append(
            "train.compile goes with neither prune, whose sizes change by the step, nor selective checkpointing; leave "
            "it out, or use activation_checkpointing=full"
        )
    if config.data.sequence > architecture.context:
        problems.append(
            f"data.sequence={config.data.sequence} is longer than the model's context={architecture.context}; "
            f"use at most {architecture.context}"
        )
    with problems:
        layout = Layout.plan(config.parallel, architecture.shape, world)
        layout.require_batch(config.train.batch, config.train.micro_batch, config.data.sequence)
    if config.distill and config.distill.samples > architecture.shape.vocab:
        problems.append(
            f"distill.samples={config.distill.samples} is more than vocab={architecture.shape.vocab}; use fewer"
        )
    with problems:
        if config.distill and config.distill.cache is None:
            _require_teacher(config, architecture, world)
    problems.tell()
    return Plan(config, architecture, target, layout)


def _require_steps(config: RunConfig) -> None:
    """Raise ConfigError where warm-up or schedule and the steps do not go together."""
    prune, steps, schedule = config.prune, config.train.steps, config.optimizer.schedule
    if prune is not None and steps < prune.warmup_steps + (prune.method == "hard_concrete"):
        raise ConfigError(
            f"train.steps={steps} end before the target sparsity is reached at prune.warmup_steps="
            f"{prune.warmup_steps}; use more steps or a shorter warm-up"
        )
    if schedule and schedule.before + steps > schedule.steps:
        raise ConfigError(
            f"optimizer.schedule.steps={schedule.steps} is less than before={schedule.before} and "
            f"train.steps={steps} together; use at least {schedule.before + steps}"
        )


def inputs(plan: Plan) -> Inputs:
    """Open weights and data and check them against the model. Raises ValueError in one line."""
    config, shape = plan.config, plan.architecture.shape
    viewers.require(config.log)
    model = open_model(config.model)
    weights = Turned(model, model.architecture) if config.prune and config.prune.rotate else model
    manifest = Manifest.read(config.data.folder, tokenizer=tokenizer_of(config), vocab=shape.vocab)
    mixture = mixture_of(config, manifest)
    names, proportions = tuple(mixture), tuple(mixture.values())
    sampler_of(config, manifest, names)  # can be made
    references = _references(config.data.reference_losses)
    if references is not None:
        Mixture(names, proportions, references, config.data.mixture)
    checkpoint = sharded.latest(Path(config.run))
    if config.optimizer.moments and checkpoint is None:
        require_pruned_to(config.optimizer.moments, plan.architecture)
    if config.init_from and checkpoint is None:
        if config.optimizer.moments or (config.prune and config.prune.rotate):
            raise ConfigError("init_from goes with neither optimizer.moments nor prune.rotate; leave one of them out")
        require_same_model(config.init_from, plan.architecture)
    if checkpoint is not None:
        saved.progress(checkpoint)  # it is whole
    teacher, cache = None, None
    if config.distill and config.distill.cache:
        cache = require_cached(config, manifest, mixture, shape.vocab)
    elif config.distill and config.distill.teacher:
        if not is_nanotron(config.distill.teacher):  # which has no tokenizer to be another
            Manifest.read(config.data.folder, tokenizer=config.distill.teacher, vocab=shape.vocab)
        teacher = open_model(config.distill.teacher)
    return Inputs(weights, manifest, names, proportions, references, teacher, cache)


def tokenizer_of(config: RunConfig) -> str:
    """Where the tokenizer of a run's model is."""
    if config.tokenizer is None and is_nanotron(config.model):
        raise ConfigError(
            f"model={config.model} is a nanotron checkpoint, which holds no tokenizer; set tokenizer to its folder or "
            "Hub id"
        )
    return config.tokenizer or config.model


def _require_teacher(config: RunConfig, student: Architecture, world: int) -> None:
    """ValueError unless the teacher has the student's vocabulary and context, and splits over its layout."""
    assert config.distill is not None
    assert config.distill.teacher is not None
    teacher = read_architecture(config.distill.teacher)
    if teacher.shape.vocab != student.shape.vocab:
        raise ConfigError(
            f"distill.teacher={config.distill.teacher} has vocab={teacher.shape.vocab}, the model "
            f"{student.shape.vocab}; use a teacher with the model's tokenizer"
        )
    if config.data.sequence > teacher.context:
        raise ConfigError(
            f"data.sequence={config.data.sequence} is longer than the teacher's context={teacher.context}; use at most "
            f"{teacher.context}"
        )
    try:
        Layout.plan(config.parallel, teacher.shape, world)
    except ValueError as error:
        raise ConfigError(f"distill.teacher={config.distill.teacher}: {error}") from None


def _references(given: dict[str, float] | str | None) -> dict[str, float] | None:
    if not isinstance(given, str):
        return given
    if given == "source":
        return None
    try:
        return TypeAdapter(dict[str, FiniteFloat]).validate_python(parse_yaml(read_text(given), given))  # JSON is YAML
    except ValueError as error:
        raise ConfigError(
            f"data.reference_losses={given} cannot be read ({in_one_line(error)}); give a JSON or YAML "
            "file of losses by domain, such as a pruning run's reference_losses.json, or `source`"
        ) from None


def precision(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of forward and backward. Weights and optimizer are float32."""
    device = choose_device(config.train.device)
    chosen = config.train.precision
    if chosen == "auto":
        chosen = "bfloat16" if device.type == "cuda" else "float32"
    return device, torch.bfloat16 if chosen == "bfloat16" else torch.float32
