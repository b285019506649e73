"""What a run would be: shapes, counts, and what each rank holds. Reads the config and the model's config.json only."""

from math import prod
from typing import get_args

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.gguf import without_k_quants
from shear_tron.checkpoint.nanotron_config import Flavour, require
from shear_tron.params import count, params
from shear_tron.train.config import RunConfig
from shear_tron.train.plan import Plan, plan

# float32 weight, gradient and two moments of Adam
BYTES_PER_PARAMETER = 16


def show(config: RunConfig, world: int | None = None) -> str:
    """The dry run of ``config`` on ``world`` ranks (default: the fewest that its layout can have), as text.

    Raises ValueError, as training would, where something does not fit.
    """
    parallel = config.parallel
    planned = plan(config, world or parallel.pp * parallel.tp * (parallel.dp or 1))
    lines = [f"model    {config.model}", *_shapes(planned), *_layout(planned), *_tokens(planned)]
    return "\n".join(lines)


def _shapes(plan: Plan) -> list[str]:
    source = plan.architecture
    lines = [_shape("source", source)]
    if plan.target:
        target = source.resized(plan.target)
        lines += [_shape("target", target), f"         keeps {count(target) / count(source):.1%}"]
        lines += [f"         {_nanotron(target)}"]
        if refused := without_k_quants(plan.target):
            lines += [f"         GGUF: k-quants want rows in multiples of 256, not {', '.join(refused)}"]
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
    shape = architecture.shape
    tied = ", tied" if shape.tied else ""
    return (
        f"{title}   {count(architecture):>14,} parameters: hidden {shape.hidden}, layers {shape.layers}, "
        f"heads {shape.heads} ({shape.kv_heads} key-value) of {shape.head_dim}, ffn {shape.ffn}, "
        f"vocab {shape.vocab}{tied}"
    )


def _layout(plan: Plan) -> list[str]:
    layout, shape = plan.layout, plan.architecture.shape
    lines = [
        f"ranks    {layout.world}: pp {layout.pp} x dp {layout.dp} (shards {layout.shard}) x tp {layout.tp}"
        + (" with sequence parallelism" if layout.tp > 1 and layout.sequence else "")
    ]
    for rank in range(layout.pp):
        stages = [rank + turn * layout.pp for turn in range(layout.stages_per_rank)]
        spans = [layout.layers(stage, shape.layers) for stage in stages]
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
            here = any(param.layer in layout.layers(stage, shape.layers) for stage in stages)
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
        f"{train.micro_batch} a data-parallel rank",
        f"steps    {train.steps:,} = {train.steps * batch / 1e9:.4g} billion tokens",
    ]
