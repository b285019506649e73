"""`shear-tron plan`: will it fit, how long will it take, in which layout. Text from the numbers of the other pages."""

from dataclasses import dataclass, replace

from shear_tron.architecture import Architecture
from shear_tron.forecast.devices import Device
from shear_tron.forecast.job import Job
from shear_tron.forecast.layouts import USABLE, Candidate, candidate, ranked
from shear_tron.parallel.topology import Layout
from shear_tron.params import count
from shear_tron.shape import Shape
from shear_tron.train.config import RunConfig
from shear_tron.train.show import said

GB = 1e9
STAGE2_BATCH = 2**20  # tokens


@dataclass(frozen=True)
class Stage:
    """One run of a recipe: what it computes in a step and how many steps. ``given``: whether its layout is wanted."""

    title: str
    job: Job
    steps: int
    target: Shape | None = None
    warm_up_share: float = 0.0
    given: bool = True

    @property
    def tokens(self) -> float:
        return float(self.steps) * self.job.batch * self.job.time


def stage(
    title: str, config: RunConfig, architecture: Architecture, layout: Layout, teacher: Architecture | None = None
) -> Stage:
    """The stage that ``config`` is, on ``layout``; teacher: of those that it runs at every step."""
    train, prune = config.train, config.prune
    target = prune.target.shape(architecture.shape) if prune else None
    job = Job.of(config, architecture, layout, teacher)
    return Stage(title, job, train.steps, target, prune.warmup_steps / train.steps if prune else 0.0)


def second_stage(first: Stage, tokens: float) -> Stage:
    """Continued pre-training of what ``first`` leaves, as the paper does it."""
    assert first.target is not None
    architecture = first.job.architecture.resized(first.target)
    batch = max(1, STAGE2_BATCH // first.job.time)
    job = replace(first.job, architecture=architecture, batch=batch, pruning=False, teacher=None)
    return Stage("stage 2, assumed", job, round(tokens / batch / first.job.time), given=False)


def text(stages: list[Stage], gpus: int, device: Device, options: int = 4) -> str:
    """The plan of a recipe on ``gpus`` of ``device``."""
    lines = [
        f"machine   {gpus} x {device.name} ({device.memory / GB:.0f} GB), {device.per_node} per node; rates assumed, "
        "see `shear-tron plan --help`"
    ]
    hours = []
    for number in stages:
        found, taken = _stage(number, gpus, device, options)
        lines += ["", *found]
        hours.append(taken)
    if all(hours):
        total = sum(hours)
        lines += ["", f"recipe    {_duration(total)} on {gpus} GPUs, {_short(total * gpus)} GPU-hours"]
    return "\n".join(lines)


def _stage(stage: Stage, gpus: int, device: Device, options: int) -> tuple[list[str], float]:
    """(lines, hours in the layout that is given if it fits, else in the fastest; 0 where none fits)."""
    job, model = stage.job, stage.job.architecture
    sizes = f"{said(count(model))} parameters"
    if stage.target:
        sizes += f" -> {said(count(model.resized(stage.target)))}"
    if job.teacher:
        sizes += f", with a teacher of {said(count(job.teacher))}"
    lines = [f"{stage.title}: {sizes}, {stage.steps:,} steps of {job.batch} x {job.time} = {said(stage.tokens)} tokens"]
    given = candidate(job, device, stage.target, stage.warm_up_share) if stage.given else None
    if given:
        lines += _candidate("as given", given, stage, device)
    fitting, others = ranked(job, gpus, device, stage.target, stage.warm_up_share)
    if fitting:
        lines.append("  layouts that fit, fastest first; hours are of the whole stage")
        lines += [_row(option, stage, device) for option in fitting[:options]]
    if others:
        nearest = others[0]
        lines.append(
            f"  does not fit: {len(others)} more layouts; the nearest wants {nearest.peak.total / GB:.0f} GB "
            f"({nearest.settings})"
        )
    chosen = given if given and given.fits(device) else fitting[0] if fitting else None
    if chosen is None:
        lines.append(f"  nothing fits: {_remedy(others, device) if others else _indivisible(job, gpus)}")
        return lines, 0.0
    if chosen is not given:
        lines += _candidate("fastest", chosen, stage, device)
    return lines, chosen.seconds * stage.steps / 3600


def _candidate(title: str, found: Candidate, stage: Stage, device: Device) -> list[str]:
    layout, job, peak = found.job.layout, found.job, found.peak
    verdict = "fits" if found.fits(device) else f"does NOT fit (usable: {USABLE * device.memory / GB:.0f} GB)"
    parts = [(name, size) for name, size in peak.parts.items() if size >= 0.005 * peak.total]
    held = ", ".join(f"{name} {_short(size / GB)}" for name, size in parts)
    when = f"when {peak.moment} on pipeline rank {peak.pp_rank}"
    lines = [
        f"  {title}: pp {layout.pp} x dp {layout.dp} (shards {layout.shard}) x tp {layout.tp}, micro_batch "
        f"{job.micro_batch}, checkpointing {job.checkpointing}",
        f"    memory   {_short(peak.total / GB)} GB per rank {when}: {verdict}",
        f"             {held}",
    ]
    for name, step in (("gates open" if found.closed else "step", found.dense), ("gates closed", found.closed)):
        if step:
            largest = sorted(step.parts.items(), key=lambda part: -part[1])[:4]
            unit, size = ("s", 1) if step.seconds >= 0.1 else ("ms", 1000)
            lines.append(
                f"    {name:13} {_short(step.seconds * size)} {unit}, {step.tokens_per_second:,.0f} tokens/s, MFU "
                f"{step.mfu(device, layout.world):.0%}: "
                + ", ".join(f"{part} {_short(seconds * size)}" for part, seconds in largest)
            )
    traffic = found.dense.traffic
    least = 1e-4 * sum(traffic.values())
    sent = ", ".join(f"{axis} {_short(size / GB)}" for axis, size in traffic.items() if size > least)
    lines.append(f"    each rank sends per step, GB: {sent or 'nothing'}")
    hours = found.seconds * stage.steps / 3600
    lines.append(f"    stage    {_duration(hours)}, {_short(hours * layout.world)} GPU-hours")
    return lines


def _row(found: Candidate, stage: Stage, device: Device) -> str:
    step, hours = found.closed or found.dense, found.seconds * stage.steps / 3600
    why = max(step.parts, key=lambda part: step.parts[part] if part != "matrix products" else 0.0)
    mfu = step.mfu(device, found.job.layout.world)
    return (
        f"    {_duration(hours):>8}  {_short(found.peak.total / GB):>7} GB  MFU {mfu:4.0%}  {found.settings}"
        f"  (besides products mostly {why})"
    )


def _indivisible(job: Job, gpus: int) -> str:
    shape = job.architecture.shape
    return (
        f"no layout of {gpus} GPUs divides train.batch={job.batch}, layers={shape.layers}, kv_heads={shape.kv_heads}; "
        "give a larger train.batch, or other --gpus"
    )


def _remedy(others: list[Candidate], device: Device) -> str:
    nearest = others[0]
    over = nearest.peak.total - USABLE * device.memory
    largest = max(nearest.peak.parts, key=lambda part: nearest.peak.parts[part])
    return (
        f"the nearest ({nearest.settings}) is {over / GB:.1f} GB over, most of it {largest}; use more GPUs, GPUs with "
        "more memory or a shorter sequence"
    )


def _short(number: float) -> str:
    """Two or three digits: 1,234; 68; 1.6; 0.003."""
    if number < 1e-3:
        return "< 0.001"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 1 else f"{number:.2g}"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return "< 1 min"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
