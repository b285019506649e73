"""Which layouts a job could have on so many GPUs, the fastest that fits first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shear_tron.config import ConfigError
from shear_tron.forecast.devices import Device
from shear_tron.forecast.job import Job
from shear_tron.forecast.memory import Peak, peak
from shear_tron.forecast.time import Step, step
from shear_tron.parallel.config import ParallelConfig
from shear_tron.parallel.topology import Layout
from shear_tron.shape import Shape, divisors

USABLE = 0.92  # of a GPU's memory: CUDA's context, NCCL's buffers and the allocator's fragments take the rest


@dataclass(frozen=True)
class Candidate:
    """A job in one layout. ``seconds`` per step on average over the run."""

    job: Job
    peak: Peak
    dense: Step  # of the whole model
    closed: Step | None  # once gates have closed, of a pruning run
    open_share: float  # of the run's work that is done as if with all gates open

    @property
    def seconds(self) -> float:
        if self.closed is None:
            return self.dense.seconds
        return self.open_share * self.dense.seconds + (1 - self.open_share) * self.closed.seconds

    def fits(self, device: Device) -> bool:
        return self.peak.total <= USABLE * device.memory

    @property
    def settings(self) -> str:
        """As overrides of a config."""
        layout, job = self.job.layout, self.job
        found = [f"parallel.tp={layout.tp}", f"parallel.pp={layout.pp}"]
        found += [f"parallel.shard={layout.shard}"] if layout.replicate > 1 else []
        found += [f"train.micro_batch={job.micro_batch}", f"train.activation_checkpointing={job.checkpointing}"]
        return " ".join(found)


def candidate(job: Job, device: Device, target: Shape | None, warm_up_share: float) -> Candidate:
    """``warm_up_share``: of the steps, over which the sparsity grows linearly; gates are taken to follow it."""
    closed = step(job, device, target) if target is not None and job.compact else None
    return Candidate(job, peak(job), step(job, device), closed, warm_up_share / 2)


def candidates(job: Job, gpus: int, device: Device) -> Iterator[Job]:
    """Every layout that the sizes allow, tensor parallelism within a node, with each way of saving memory."""
    shape = job.architecture.shape
    for tp in divisors(device.per_node):
        for pp in divisors(shape.layers):
            if gpus % (tp * pp) or pp > 16:
                continue
            dp = gpus // (tp * pp)
            shards = {dp, min(dp, max(1, device.per_node // tp)), min(dp, 64)}
            for shard in sorted(shards):
                if dp % shard:
                    continue
                for micro_batch in (n for n in divisors(job.batch) if n <= 16):
                    try:
                        layout = Layout.plan(ParallelConfig(tp=tp, pp=pp, shard=shard), shape, gpus)
                        layout.require_batch(job.batch, micro_batch, job.time)
                        if job.teacher:
                            Layout.plan(ParallelConfig(tp=tp, pp=pp, shard=shard), job.teacher.shape, gpus)
                    except (ConfigError, ValueError):
                        continue
                    for checkpointing in ("none", "selective", "full"):
                        yield replace(job, layout=layout, micro_batch=micro_batch, checkpointing=checkpointing)


def ranked(
    job: Job, gpus: int, device: Device, target: Shape | None, warm_up_share: float
) -> tuple[list[Candidate], list[Candidate]]:
    """(those that fit, fastest first; those that do not, least too large first). Of each layout the best setting."""
    fitting: dict[Layout, Candidate] = {}
    others: dict[Layout, Candidate] = {}
    for option in candidates(job, gpus, device):
        found, layout = candidate(option, device, target, warm_up_share), option.layout
        if found.fits(device):
            if layout not in fitting or found.seconds < fitting[layout].seconds:
                fitting[layout] = found
        elif layout not in others or found.peak.total < others[layout].peak.total:
            others[layout] = found
    return (
        sorted(fitting.values(), key=lambda found: found.seconds),
        sorted((c for key, c in others.items() if key not in fitting), key=lambda found: found.peak.total),
    )
