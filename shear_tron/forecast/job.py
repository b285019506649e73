"""What is to be forecast: a model, a layout and the portions of a step, without weights, data or devices."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

from shear_tron.architecture import Architecture
from shear_tron.parallel.topology import Layout
from shear_tron.params import params
from shear_tron.shape import Shape
from shear_tron.train.config import RunConfig


@dataclass(frozen=True)
class Job:
    """One step of a run. ``fused``: kernels serve the masked ops (CUDA), not their definitions (CPU)."""

    architecture: Architecture
    layout: Layout
    batch: int  # sequences, all ranks' together
    micro_batch: int
    time: int  # tokens of a sequence
    checkpointing: Literal["none", "selective", "full"] = "none"
    compute_bytes: int = 2  # of an activation, and of a gathered weight
    fused: bool = True
    pruning: bool = False
    compact: bool = True
    teacher: Architecture | None = (
        None  # run forward at every step; one that is read from a cache costs next to nothing
    )
    teacher_bytes: int = 2  # of its weights and activations

    @classmethod
    def of(
        cls, config: RunConfig, architecture: Architecture, layout: Layout, teacher: Architecture | None = None
    ) -> "Job":
        """A step of ``config`` on GPUs: bfloat16 and kernels."""
        train, prune, distill = config.train, config.prune, config.distill
        return cls(
            architecture,
            layout,
            train.batch,
            train.micro_batch,
            config.data.sequence,
            train.activation_checkpointing,
            pruning=prune is not None,
            compact=prune.compact if prune else True,
            teacher=teacher,
            teacher_bytes=4 if distill and distill.precision == "float32" else 2,
        )

    @property
    def taught(self) -> "Job | None":
        """The teacher, as a job of its own of which only the forward is done."""
        if self.teacher is None:
            return None
        plain = {"compute_bytes": self.teacher_bytes, "pruning": False, "teacher": None}
        return replace(self, architecture=self.teacher, **plain)  # type: ignore[arg-type]

    @property
    def microbatches(self) -> int:
        """Of each data-parallel rank in a step."""
        return self.batch // self.micro_batch // self.layout.dp

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.micro_batch * self.time

    @property
    def streams(self) -> int:
        """Tokens of a microbatch whose residual stream this rank holds."""
        return self.tokens // (self.layout.tp if self.layout.sequence else 1)

    def part(self, shape: Shape) -> Shape:
        """What a tensor-parallel rank holds of a model of ``shape``."""
        cut = {name: getattr(shape, name) // self.layout.tp for name in ("vocab", "heads", "kv_heads", "ffn")}
        return replace(shape, **cut)

    def layers(self, pp_rank: int) -> int:
        """That a pipeline rank holds."""
        return sum(len(self.layout.layers(stage, self.architecture)) for stage in self.layout.stages(pp_rank))

    @property
    def most_layers(self) -> int:
        return max(map(self.layers, range(self.layout.pp)))

    @cached_property
    def held(self) -> "Held":
        return Held.of(self)


@dataclass(frozen=True)
class Held:
    """Parameters of a tensor-parallel rank's part, before data parallelism shares them out."""

    layer: int
    embed: int
    head: int  # final norm included; with tied embeddings the norm alone
    branch_ends: int  # of ``layer``, in the matrices that end its branches: o and down

    @classmethod
    def of(cls, job: Job) -> "Held":
        found = {"layer": 0, "embed": 0, "head": 0, "ends": 0}
        for param in params(job.architecture):
            count = prod(param.size) // (1 if param.row.cut_axis is None else job.layout.tp)
            if param.layer is None:
                found["embed" if param.row.where == "first" else "head"] += count
            elif param.layer == 0:
                found["layer"] += count
                found["ends"] += count if param.row.leaf in ("o", "down") else 0
        return cls(found["layer"], found["embed"], found["head"], found["ends"])

    def root(self, job: Job, pp_rank: int) -> int:
        """Outside the layers, on pipeline rank ``pp_rank``: embedding, final norm, head."""
        first, last = pp_rank == 0, pp_rank == job.layout.pp - 1
        embed = first or (last and job.architecture.shape.tied)
        return (self.embed if embed else 0) + (self.head if last else 0)

    def total(self, job: Job, pp_rank: int) -> int:
        return self.layer * job.layers(pp_rank) + self.root(job, pp_rank)
