"""Bytes a rank needs at the peak of a step, by part.

A step has three moments that can be its peak. *Backward begins*: every activation that was saved is there, the loss or
the last layer's backward works, and where gradients are accumulated over microbatches FSDP holds them unsharded.
*Backward of the first layer*: all other layers' gradients are there. *Backward ends*: those outside the layers are
being reduced. What is counted is what autograd saves (``saved``, by the ops' own ``save_for_backward``) and what FSDP2
gathers; an allocator's fragments are not.
"""

from dataclasses import dataclass

from shear_kernels import distillation
from shear_kernels.cross_entropy import CHUNK_LOGITS, KEPT_BYTES

from shear_tron.forecast.job import Job

WIDE = 4  # bytes of a master weight, a gradient, a moment
WHOLE = 15 / 16  # share of a weight above which compact steps copy nothing (shear_tron.train.pruner)


@dataclass(frozen=True)
class Peak:
    """``parts`` in bytes, at ``moment``, on the pipeline rank that needs most."""

    moment: str
    pp_rank: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak(job: Job) -> Peak:
    """The largest need of any rank."""
    return max((p for rank in range(job.layout.pp) for p in _moments(job, rank)), key=lambda found: found.total)


def told(found: Peak) -> str:
    """The lines of `show`."""
    parts = [f"{name} {size / 1e9:.3g}" for name, size in found.parts.items() if size >= 0.005 * found.total]
    return (
        f"memory   {found.total / 1e9:,.3g} GB per rank at its peak, when {found.moment}:\n"
        f"         {', '.join(parts)}\n"
        "         (`shear-tron plan` adds time, traffic and other layouts)"
    )


def _moments(job: Job, pp_rank: int) -> list[Peak]:
    layout, held, shape = job.layout, job.held, job.architecture.shape
    layers = job.layers(pp_rank)
    mine, root, last = held.total(job, pp_rank), held.root(job, pp_rank), pp_rank == layout.pp - 1
    # One layer works while the next one is gathered; a pipeline keeps all gathered until the step's end.
    gathered = held.layer * (min(layers, 2) if layout.pp == 1 else layers) + root
    accumulates = job.microbatches > 1
    states = {
        "weights": WIDE * mine // layout.shard,
        "Adam's moments": 2 * WIDE * mine // layout.shard,
        "gates": _gates(job),
        "teacher": _teacher(job, pp_rank),
    }
    inputs = job.streams * shape.hidden * job.compute_bytes  # of a layer
    whole, kept = saved(job), _kept_of_layer(job)
    head = (held.embed if shape.tied else held.head) * last
    begins = states | {
        "gathered weights": job.compute_bytes * gathered,
        "unsharded gradients": WIDE * mine if accumulates else 0,
        "activations": in_flight(job, pp_rank) * layers * kept + 3 * inputs * last,
        "copies of weights": _copies(job) * (layers if job.checkpointing == "none" else 1),
        "working": max(
            _loss(job) if last else 0,
            _layer_backward(job) + whole - kept + (0 if accumulates else WIDE * head),
        ),
    }
    done = states | {
        "gathered weights": job.compute_bytes * gathered,
        "gradients": WIDE * held.layer * layers // layout.shard,
        "unsharded gradients": WIDE * root,
    }
    first = done | {"activations": kept, "working": _layer_backward(job) + whole - kept}
    ends = done | {"working": WIDE * root}  # laid flat for their reduction
    return [
        Peak("backward begins", pp_rank, begins),
        Peak("backward of the first layer", pp_rank, first),
        Peak("backward ends", pp_rank, ends),
    ]


def saved(job: Job) -> int:
    """Bytes that autograd keeps of one layer and one microbatch, the layer's input included.

    Kernels save less than definitions, which keep every product on the way.
    """
    shape, tp = job.architecture.shape, job.layout.tp
    e, n, m, heads = job.compute_bytes, job.tokens, job.streams, shape.heads * shape.head_dim
    attention = 2 * heads + 2 * shape.kv_heads * shape.head_dim  # q, out; k, v
    if job.fused:
        stream, ffn = 2, 3  # the input and the stream between the branches; gate, up and their product
        if job.pruning and not job.compact:
            stream = 4  # and what attention and MLP add, for the gradients of their masks
    else:
        stream, ffn = 4, 4  # and each norm's x / rms; and silu(gate)
    if job.architecture.mlp == "gelu":
        ffn = 2  # up and what GELU makes of it
    per_token = e * 2 * shape.hidden  # the two normed inputs of products, gathered under sequence parallelism
    per_token += (e * attention + e * ffn * shape.ffn + WIDE * shape.heads) // tp
    return n * per_token + m * shape.hidden * e * stream


def in_flight(job: Job, pp_rank: int) -> int:
    """Microbatches whose activations a pipeline rank holds at once, in units of all its layers."""
    layout = job.layout
    if layout.pp == 1:
        return 1
    if layout.stages_per_rank == 1:
        return min(layout.pp - pp_rank, job.microbatches)
    warm_up = 2 * (layout.pp - pp_rank - 1) + (layout.stages_per_rank - 1) * layout.pp + 1
    return -(-min(warm_up, job.microbatches * layout.stages_per_rank) // layout.stages_per_rank)


def _kept_of_layer(job: Job) -> int:
    """What stays of a layer's activations until its backward, by the checkpointing policy."""
    shape, e = job.architecture.shape, job.compute_bytes
    inputs = job.streams * shape.hidden * e
    if job.checkpointing == "none":
        return saved(job)
    if job.checkpointing == "full":
        return inputs
    cut = (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 2 * shape.ffn  # what products gave: q, k, v, gate, up
    cut += shape.heads * shape.head_dim  # and attention
    return inputs + job.tokens * e * (2 * shape.hidden + cut // job.layout.tp)  # and both branches' ends


def _layer_backward(job: Job) -> int:
    """Gradients within a layer that are alive at once: three of ffn width and three of the stream."""
    shape = job.architecture.shape
    return job.compute_bytes * job.tokens * (3 * shape.ffn // job.layout.tp + 3 * shape.hidden)


def _loss(job: Job) -> int:
    """The loss at its most: what it keeps of the logits, and a chunk of them, or the head's gradient, a chunk's share
    of it and the gradient of the loss's input."""
    shape, e = job.architecture.shape, job.compute_bytes
    vocab = shape.vocab // job.layout.tp
    chunk = WIDE * vocab * min(job.tokens, max(1, CHUNK_LOGITS // vocab))
    gradients = 2 * WIDE * vocab * shape.hidden + 2 * e * job.tokens * shape.hidden
    kept = e * job.tokens * vocab
    if job.teacher:
        rows = distillation.CHUNK_LOGITS["cuda" if job.fused else "cpu"] // vocab
        part = vocab * min(job.tokens, max(1, rows))
        made, kept = 4 * WIDE * part, 2 * kept  # of a chunk, four at once (at temperature 1); two of them stay
        return kept + max(gradients, made - 2 * e * part) if keeps_logits(job) else made + gradients
    if not keeps_logits(job):
        return chunk + gradients
    return kept + max(gradients, 0 if e == WIDE else chunk)  # in float32 the chunk itself is what is kept


def keeps_logits(job: Job) -> bool:
    """Whether the loss keeps what its backward would have to compute again."""
    terms = 2 if job.teacher else 1  # a derivative for each of the two losses
    return terms * job.compute_bytes * job.tokens * (job.architecture.shape.vocab // job.layout.tp) <= KEPT_BYTES


def _copies(job: Job) -> int:
    """Copies of a layer's weights in a pruning step, at most: the kept rows and columns, and masks folded into what
    leaves a branch, of which kernels keep the part before that and definitions what is between two masks too."""
    if not job.pruning:
        return 0
    cut, ends = WHOLE**2 if job.compact else 0.0, job.compute_bytes * job.held.branch_ends
    folded = 2.0 * ends if not job.fused else cut * ends
    return int(job.compute_bytes * job.held.layer * cut + folded)


def _teacher(job: Job, pp_rank: int) -> int:
    """A teacher's shards, what is outside its layers gathered, and its final states. Its layers' activations are gone
    when backward begins, and smaller than the student's."""
    taught = job.taught
    if taught is None:
        return 0
    whole, root, e = taught.held.total(taught, pp_rank), taught.held.root(taught, pp_rank), taught.compute_bytes
    last = pp_rank == job.layout.pp - 1
    states = (job.microbatches if job.layout.pp > 1 else 1) * job.tokens * taught.architecture.shape.hidden * e * last
    return e * (whole // job.layout.shard + root) + states


def _gates(job: Job) -> int:
    """Logits, their gradients and moments, and the sampled masks of a rank's microbatches. On the host, mostly."""
    if not job.pruning:
        return 0
    shape = job.architecture.shape
    gates = shape.hidden + shape.layers * (1 + shape.kv_heads + shape.heads_per_group + shape.ffn)
    return WIDE * gates * (4 + 2 * job.microbatches)
