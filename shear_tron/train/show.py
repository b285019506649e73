"""What a run would be: shapes, counts, what each rank holds, what the data has. Opens no weights and no shards."""

from math import prod
from pathlib import Path
from typing import get_args

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.gguf import without_k_quants
from shear_tron.checkpoint.model_folder import is_here, read_architecture
from shear_tron.checkpoint.nanotron_config import Flavour, require
from shear_tron.checkpoint.serving import objections
from shear_tron.config import ConfigError
from shear_tron.data.manifest import Manifest
from shear_tron.params import count, params
from shear_tron.pruning.gates import LIMIT
from shear_tron.train.config import RunConfig
from shear_tron.train.drawn import forecast
from shear_tron.train.plan import Plan, plan, tokenizer_of
from shear_tron.train.samples import mixture_of
from shear_tron.train.schedule import rate_factor

# float32 weight, gradient and two moments of Adam
BYTES_PER_PARAMETER = 16


def show(config: RunConfig, world: int | None = None, source: RunConfig | None = None) -> tuple[Plan, str]:
    """The dry run of ``config`` on ``world`` ranks (default: the fewest that its layout can have), and as text.

    source: the pruning run that is to make its model, if that is not there yet.
    Raises ValueError, as training would, where something does not fit.
    """
    parallel = config.parallel
    architecture = None
    if source is None and not is_here(config.model):
        try:
            read_architecture(config.model)
        except ValueError as error:
            hint = "if a pruning run is to make it, add --after with that run's config"
            raise ConfigError(f"model={error}; {hint}") from None
    if source is not None:
        if source.prune is None:
            raise ConfigError("--after wants the config of a pruning run; this one has no `prune` section")
        found = source.source(read_architecture(source.model))
        architecture = found.resized(source.prune.target.shape(found.shape))
        unknown: dict[str, object] = {"weights": source.data.weights, "after": None}  # where the source will end
        begun = {key: value for key, value in unknown.items() if getattr(config.data, key) == source.run}
        config = config.model_copy(update={"data": config.data.model_copy(update=begun)})
    planned = plan(config, world or parallel.pp * parallel.tp * (parallel.dp or 1), architecture)
    lines = [f"model    {config.model}", *_shapes(planned), *_layout(planned), *_tokens(planned)]
    return planned, "\n".join([*lines, *_gates(config), *_data(planned)])


def _shapes(plan: Plan) -> list[str]:
    source = plan.architecture
    lines = [_shape("source", source)]
    if plan.target:
        target = source.resized(plan.target)
        lines += [_shape("target", target), f"         keeps {count(target) / count(source):.1%}"]
        lines += [f"         {_nanotron(target)}"]
        if refused := without_k_quants(plan.target):
            lines += [f"         GGUF: k-quants want rows in multiples of 256, not {', '.join(refused)}"]
        lines += [f"         {objection}" for objection in objections(target)]
    return lines


def _nanotron(target: Architecture) -> str:
    """Whether nanotron has such a model."""
    for flavour in get_args(Flavour):
        try:
            require(target, flavour)
        except ValueError as error:
            reason = str(error)
        else:
            return f"nanotron: can go on there, in {'main only' if flavour == 'main' else 'release 0.4 and main'}"
    return f"nanotron: cannot go on there: {reason}"


def _shape(title: str, architecture: Architecture) -> str:
    return f"{title}   {count(architecture):>14,} parameters: {architecture.shape}"


def _layout(plan: Plan) -> list[str]:
    layout = plan.layout
    lines = [
        f"ranks    {layout.world}: pp {layout.pp} x dp {layout.dp} (shards {layout.shard}) x tp {layout.tp}"
        + (" with sequence parallelism" if layout.tp > 1 and layout.sequence else "")
    ]
    for rank in range(layout.pp):
        stages = layout.stages(rank)
        spans = [layout.layers(stage, plan.architecture) for stage in stages]
        held = held_parameters(plan, stages)
        spelled = " and ".join(f"{span.start}-{span.stop - 1}" for span in spans)
        lines.append(
            f"         pp {rank}: layers {spelled}; each rank {held / 1e6:,.1f} M parameters, "
            f"{held * BYTES_PER_PARAMETER / 1e9:,.2f} GB of weights, gradients and Adam"
        )
    return lines


def held_parameters(plan: Plan, stages: list[int]) -> int:
    """Parameters that a rank holding pipeline ``stages`` stores, after the tensor-parallel cut and sharding."""
    layout, shape = plan.layout, plan.architecture.shape
    last = layout.pp * layout.stages_per_rank - 1
    total = 0
    for param in params(plan.architecture):
        if param.layer is not None:
            here = any(param.layer in layout.layers(stage, plan.architecture) for stage in stages)
        elif param.row.where == "first":
            here = 0 in stages or (shape.tied and last in stages)
        else:
            here = last in stages
        if here:
            parts = layout.shard * (1 if param.row.cut_axis is None else layout.tp)
            total += -(-prod(param.size) // parts)
    return total


def _tokens(plan: Plan) -> list[str]:
    train, data = plan.config.train, plan.config.data
    batch = train.batch * data.sequence
    return [
        f"batch    {train.batch} sequences of {data.sequence} = {batch:,} tokens; {plan.microbatches} microbatches of "
        f"{train.micro_batch} per data-parallel rank",
        f"steps    {train.steps:,} = {said(train.steps * batch)} tokens",
    ]


def said(number: float) -> str:
    """For people: 1.678 billion."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,.0f}"


def _gates(config: RunConfig) -> list[str]:
    """Whether gates can go from open to closed in the steps given: AdamW moves a logit by its rate at most."""
    prune, steps = config.prune, config.train.steps
    if prune is None or prune.method != "hard_concrete":
        return []
    factors = sum(rate_factor(config, step) for step in range(steps))
    travel, needed = prune.learning_rate * factors, 2 * LIMIT
    verdict = "enough" if travel >= 2 * needed else "hardly enough" if travel >= needed else "they will NOT close"
    lines = [f"gates    a logit can move {travel:.1f} in {steps:,} steps, {needed:.1f} closes an open gate: {verdict}"]
    if travel < 2 * needed:
        rate = 2 * needed / factors
        lines.append(f"         use more steps, or prune.learning_rate={rate:.2g}: multipliers need time to grow too")
    return lines


def _data(plan: Plan) -> list[str]:
    """What each domain has, next to what the run will ask of it."""
    config, data = plan.config, plan.config.data
    if not Path(data.folder).exists():
        return [f"data     {data.folder} is not there yet: not checked"]
    tokenizer = tokenizer_of(config) if config.tokenizer or is_here(config.model) else None
    manifest = Manifest.read(data.folder, tokenizer=tokenizer, vocab=plan.architecture.shape.vocab)
    mixture = mixture_of(config, manifest)
    total, tokens = sum(mixture.values()), config.train.steps * config.train.batch * data.sequence
    lines = [f"data     {data.folder}: made with this model's tokenizer" if tokenizer else f"data     {data.folder}"]
    for name, weight in mixture.items():
        has, held_out = manifest.domain(name).tokens(), manifest.domain(name).tokens("held_out") // data.sequence
        epochs = tokens * weight / total / has
        note = "" if epochs <= 4 else ", more than the 4 that cost little"
        few = "" if held_out >= data.evaluate_windows else f" (fewer than evaluate_windows={data.evaluate_windows})"
        lines.append(
            f"         {name}: {has:,} tokens, {epochs:.3g} epochs at weight {weight / total:.2g}{note}; "
            f"{held_out} held-out window{'s' * (held_out != 1)}{few}"
        )
    if config.distill and config.distill.cache:
        lines.append(f"teacher  {forecast(config, manifest, mixture, plan.architecture.shape.vocab)}")
    return lines
