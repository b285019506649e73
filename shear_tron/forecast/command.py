"""From what `shear-tron plan` is given to the stages of a recipe."""

import argparse
from dataclasses import replace

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.model_folder import is_here
from shear_tron.config import ConfigError, load
from shear_tron.forecast.devices import device
from shear_tron.forecast.job import Job
from shear_tron.forecast.known import architecture, teacher
from shear_tron.forecast.recipe import Stage, second_stage, stage, text
from shear_tron.forecast.target import propose
from shear_tron.parallel.topology import Layout
from shear_tron.params import count
from shear_tron.shape import Shape
from shear_tron.train.config import RunConfig

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def plan(arguments: argparse.Namespace) -> str:
    """The plan that the command's arguments ask for. Raises ValueError where they do not fit together."""
    chosen = device(arguments.gpu, arguments.devices, arguments.gpus_per_node)
    files = [given for given in arguments.given if "=" not in given]
    overrides = [given for given in arguments.given if "=" in given]
    if bool(files) == bool(arguments.model):
        raise ConfigError("give the config of a run, or --model and --parameters")
    if not files:
        return _without_config(arguments, chosen.per_node) + "\n" + text(_paper(arguments), arguments.gpus, chosen)
    stages = _stages(files, overrides, arguments.gpus)
    if len(stages) == 1 and stages[0].target:
        stages.append(second_stage(stages[0], number(arguments.tokens)))
    return text(stages, arguments.gpus, chosen)


def number(text: str) -> float:
    """1.3B -> 1.3e9. Raises ConfigError."""
    unit = UNITS.get(text[-1:].upper())
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number; write 1300000000, 1.3e9 or 1.3B (K, M, B, T)") from None


def _stages(files: list[str], overrides: list[str], gpus: int) -> list[Stage]:
    stages: list[Stage] = []
    for order, file in enumerate(files, 1):
        config = load(RunConfig, file, overrides)
        target = stages[-1].target if stages else None
        if target is not None and not is_here(config.model):
            found = stages[-1].job.architecture.resized(target)  # the model is yet to be made
        else:
            found = architecture(config.model)
        parallel = config.parallel
        try:
            layout = Layout.plan(parallel, found.shape, gpus)
        except ConfigError:  # made for another number of ranks
            layout = Layout.plan(parallel.model_copy(update={"dp": None, "shard": None}), found.shape, gpus)
        stages.append(stage(f"stage {order}, {file}", config, found, layout, teacher(config)))
        try:
            layout.require_batch(config.train.batch, config.train.micro_batch, config.data.sequence)
        except ValueError:
            stages[-1] = replace(stages[-1], given=False)
    return stages


def _source_and_targets(arguments: argparse.Namespace) -> tuple[Architecture, list[Shape]]:
    if arguments.parameters is None:
        raise ConfigError("--model without a config needs --parameters, the size of the target, such as 1.3B")
    source = architecture(arguments.model)
    return source, propose(source, number(arguments.parameters))


def _without_config(arguments: argparse.Namespace, per_node: int) -> str:
    source, targets = _source_and_targets(arguments)
    lines = [f"source    {arguments.model}: {count(source):,} parameters"]
    for shape in targets:
        given = ", ".join(
            f"{name}: {getattr(shape, name)}"
            for name in ("hidden", "layers", "heads", "kv_heads", "ffn")
            if getattr(shape, name) != getattr(source.shape, name)
        )
        lines.append(f"target    {{{given}}}  # {count(source.resized(shape)):,} parameters")
    return "\n".join([*lines, "The first target with the paper's recipe (its Table 7):", ""])


def _paper(arguments: argparse.Namespace) -> list[Stage]:
    source, targets = _source_and_targets(arguments)
    job = Job(source, Layout(shard=arguments.gpus), 32, 1, min(4096, source.context), pruning=True)
    first = Stage("stage 1, the paper's", job, 3200, targets[0], 640 / 3200, given=False)
    return [first, second_stage(first, number(arguments.tokens))]
