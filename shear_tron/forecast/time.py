"""Seconds of a step, by a roofline: work over rates, one part after another.

Conventions. Matrix products and attention run at the device's rates for them; everything else moves bytes. FSDP's
collectives of a microbatch hide behind its computation and only what is longer shows; tensor-parallel collectives never
hide; pipeline messages always do, and its bubble is (pp - 1) / (stages per rank * microbatches) of the work. MFU counts
the model's operations (``shear_tron.model.flops``: causal half, nothing computed twice) against the data sheet.
"""

from dataclasses import dataclass, replace
from math import sqrt

from shear_kernels import roofline

from shear_tron.forecast.devices import Device
from shear_tron.forecast.job import Job
from shear_tron.forecast.memory import keeps_logits
from shear_tron.model.flops import flops
from shear_tron.params import count
from shear_tron.shape import Shape

WIDE = 4
# Bytes that passes of plain torch move, by what they are per. From the passes that the code makes.
LOGIT = 116  # of the loss, beyond its products
RESIDUAL = 120  # a masked residual in float32, forward and backward, per element of the stream
GATHERED = 9  # per parameter and microbatch: casting and copying out of all-gathers
ACCUMULATED = 10  # per parameter and microbatch: adding a gradient to the unsharded sum
OPTIMIZER = 28  # per parameter of the rank's shard: weight, gradient and moments read, three written


@dataclass(frozen=True)
class Step:
    """``seconds`` by part; ``traffic``: bytes a rank sends in a step, by axis."""

    parts: dict[str, float]
    traffic: dict[str, float]
    tokens: int  # of all ranks
    model_flops: float  # of all ranks

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def mfu(self, device: Device, world: int) -> float:
        return self.model_flops / (self.seconds * device.peak * world)


def step(job: Job, device: Device, kept: Shape | None = None) -> Step:
    """One step of ``job``; ``kept``: what a compact step computes on (default: the whole model)."""
    shape = job.architecture.shape
    run = replace(job, architecture=job.architecture.resized(kept or shape))
    layout, layers = job.layout, (kept or shape).layers
    parts = {name: job.microbatches * seconds for name, seconds in _compute(job, run, device).items()}
    if taught := job.taught:
        parts["teacher's forward"] = job.microbatches * _forward(taught, keeps_logits(job), device)
    work = sum(parts.values())
    traffic = traffic_of(job)
    tensor = traffic["tensor"] / _rate(layout.tp, 1, device) * layers / shape.layers
    tensor += traffic.get("teacher's tensor", 0.0) / _rate(layout.tp, 1, device)
    parts["tensor-parallel collectives"] = tensor
    hops = job.most_layers * (2 * job.microbatches + 1) * (layout.shard - 1) * device.hop
    data = (traffic["data"] + traffic.get("teacher's data", 0.0)) / _rate(layout.dp, layout.tp, device) + hops
    parts["FSDP's collectives that show"] = max(0.0, data - work - tensor)
    bubble = (layout.pp - 1) / (layout.stages_per_rank * job.microbatches)
    parts["pipeline bubble"] = bubble * (work + tensor)
    parts["optimizer"] = OPTIMIZER * job.held.total(job, 0) / layout.shard / device.bandwidth
    tokens = job.batch * job.time
    model = flops(run.architecture, range(layers), True, tokens, job.time)
    if job.teacher:
        model += flops(job.teacher, range(job.teacher.shape.layers), True, tokens, job.time) // 3
    return Step(
        {name: seconds for name, seconds in parts.items() if seconds},
        traffic,
        tokens,
        model,
    )


def _rate(ranks: int, apart: int, device: Device) -> float:
    """Bus bandwidth of a group of ``ranks`` that are ``apart`` places from each other. Between nodes every member in a
    node brings its own port."""
    if ranks * apart <= device.per_node:
        return device.within_node
    return min(device.within_node, max(1, device.per_node // apart) * device.between_nodes)


def computed(job: Job) -> tuple[int, int]:
    """Operations that the ranks really do in a step: in matrix products, and in attention (causal half)."""
    shape, tokens = job.architecture.shape, job.batch * job.time
    layers = range(shape.layers)
    attention = 6 * tokens * job.time * shape.heads * shape.head_dim * shape.layers
    products = flops(job.architecture, layers, True, tokens, job.time) - attention
    if not keeps_logits(job):
        products += 2 * tokens * shape.vocab * shape.hidden
    if job.checkpointing == "full":  # all but the last product of a layer, which nobody's backward reads
        products += (flops(job.architecture, layers, False, tokens, job.time) - attention) // 3
        products -= 2 * tokens * shape.hidden * shape.ffn * shape.layers
    return products, attention + (attention // 3 if job.checkpointing == "full" else 0)


def _compute(job: Job, run: Job, device: Device) -> dict[str, float]:
    """Seconds of a microbatch on one rank, the slowest pipeline stage's share."""
    layout, n = job.layout, job.tokens
    kept = run.architecture.shape
    part = job.part(kept)
    layers = run.most_layers
    heads = part.heads * part.head_dim
    pair = 2.0 * n * job.time * heads * layers  # two products of forward attention, causal half
    once = flops(run.architecture.resized(part), range(layers), False, n, job.time) - 3 * pair
    again = {"full": once / 3, "selective": 0.0, "none": 0.0}[job.checkpointing]
    attention = 3.5 * pair + (pair if job.checkpointing == "full" else 0.0)
    head = (6.0 if keeps_logits(job) else 8.0) * n * part.vocab * kept.hidden  # forward 2, backward 4, logits again 2
    streams, ffn = job.streams, part.ffn
    ops = [
        *roofline.masked_rms_norm(streams, kept.hidden),
        *roofline.add_rms_norm(streams, kept.hidden),
        *roofline.masked_swiglu(n, ffn),
        *roofline.rope(n, part.heads, part.kv_heads, part.head_dim),
    ]
    moved = layers * (sum(work.bytes for work in ops) + (RESIDUAL if job.pruning else 8) * streams * kept.hidden)
    mine = job.held.total(job, 0)
    weights = float(GATHERED * mine + (ACCUMULATED * mine if job.microbatches > 1 else 0))
    if job.pruning and job.compact:
        share = count(run.architecture) / count(job.architecture)
        weights += 2 * mine * (sqrt(share) + 2 * share + 1)  # gather kept rows; scatter into a whole gradient
    last = 1 if layout.pp == 1 else 1 / layout.pp  # of the head, were stages balanced
    return {
        "matrix products": (once + again + head * last) / device.products,
        "attention": attention / device.attention,
        "other ops": moved / device.bandwidth,
        "loss beyond its products": LOGIT * n * part.vocab * last / device.bandwidth,
        "weights moved": weights / device.bandwidth,
    }


def _forward(taught: Job, once: bool, device: Device) -> float:
    """Seconds of a teacher's forward of a microbatch, its logits included; once: backward makes them not again."""
    n, pp, part = taught.tokens, taught.layout.pp, taught.part(taught.architecture.shape)
    layers = -(-part.layers // pp)
    pair = 2.0 * n * taught.time * part.heads * part.head_dim * layers
    products = flops(taught.architecture.resized(part), range(layers), False, n, taught.time) / 3 - pair
    products += (2.0 if once else 4.0) * n * part.vocab * part.hidden / pp
    return products / device.products + pair / device.attention


def traffic_of(job: Job) -> dict[str, float]:
    """Bytes that a rank sends in a step, by axis of the layout, on the busiest pipeline rank."""
    layout, shape, e = job.layout, job.architecture.shape, job.compute_bytes
    mine, layers = job.held.total(job, 0), job.most_layers
    others = (layout.shard - 1) / layout.shard
    gathers = 1 if layout.pp > 1 else 2 * job.microbatches  # forward and backward; a pipeline keeps weights gathered
    data = others * mine * (gathers * e + WIDE) + 2 * WIDE * mine / layout.shard * (1 - 1 / layout.replicate)
    stream = e * job.tokens * shape.hidden * (layout.tp - 1) / layout.tp
    # Each layer enters and leaves twice, forward and backward; embedding and head once. All-reduces count double.
    again = 2 if job.checkpointing == "full" else 0
    crossings = (8 + again * 2) * layers + 4
    tensor = job.microbatches * crossings * stream * (1 if layout.sequence or layout.tp == 1 else 2)
    pipeline = 2 * job.microbatches * e * job.streams * shape.hidden * layout.stages_per_rank * (layout.pp > 1)
    found = {"data": data, "tensor": tensor, "pipeline": float(pipeline)}
    if taught := job.taught:  # forward only: weights gathered once, four crossings of a layer
        e, deep = taught.compute_bytes, taught.architecture.shape
        found["teacher's data"] = others * taught.held.total(taught, 0) * job.microbatches * e
        stream = e * job.tokens * deep.hidden * (layout.tp - 1) / layout.tp
        found["teacher's tensor"] = job.microbatches * (4 * deep.layers // layout.pp + 2) * stream
    if job.pruning:
        gates = shape.hidden + shape.layers * (1 + shape.kv_heads + shape.heads_per_group + shape.ffn)
        found["gates"] = 2.0 * WIDE * gates * (1 - 1 / layout.world)
    return found
