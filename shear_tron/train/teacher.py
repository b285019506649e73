"""A teacher is a second list of stages, in the same layout, run forward only before each step."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.model.context import DENSE, Context, TeacherStates
from shear_tron.model.distill import Distill, FinalStates
from shear_tron.model.flops import flops
from shear_tron.model.readout import NEXT_TOKEN, Readout
from shear_tron.parallel.data import Weights, shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Topology
from shear_tron.train.config import RunConfig
from shear_tron.train.plan import Inputs, Plan


def teacher_precision(config: RunConfig, compute: torch.dtype) -> torch.dtype:
    """The dtype of the teacher's weights and activations; compute: that of training."""
    chosen = config.distill.precision if config.distill else "auto"
    return compute if chosen == "auto" else {"bfloat16": torch.bfloat16, "float32": torch.float32}[chosen]


def readout_of(config: RunConfig) -> Readout:
    """What a run makes of its final states: the next-token loss, or with it the divergence from a teacher."""
    return Distill(config.distill.alpha, config.distill.temperature) if config.distill else NEXT_TOKEN


class Teacher:
    """Gives the microbatches of a step their teacher's final states, on ranks that hold the last stage.

    FSDP shards its layers and gathers them one at a time; embedding, final norm and head stay whole on the ranks that
    hold them.

    Args:
        architecture, weights: the teacher; ``layout`` must split it as it splits the student.
        count, micro_batch, time, documents: as for ``Engine``.
        compute: dtype of its weights and activations.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        topology: Topology,
        count: int,
        micro_batch: int,
        time: int,
        compute: torch.dtype,
        documents: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.readout, self.count, self.in_pipeline = FinalStates(), count, topology.layout.pp > 1
        stages = build_stages(architecture, topology, "none", self.readout)
        stages = [shard(stage, weights, topology, compute, compute) for stage in stages]
        for stage in stages:
            stage.requires_grad_(False)
        # Without a pipeline a microbatch is taught when its turn comes: one's states are in memory, not all.
        self.engine = Engine(stages, topology, count if self.in_pipeline else 1, micro_batch, time, compute, documents)
        tokens, layers = count * micro_batch * time * topology.layout.dp, range(architecture.shape.layers)
        self.flops = flops(architecture, layers, True, tokens, time) // 3  # of a step on all ranks; no backward

    @classmethod
    def of(cls, plan: Plan, inputs: Inputs, topology: Topology, compute: torch.dtype) -> "Teacher":
        """The teacher that a run opened. compute: dtype of training."""
        assert inputs.teacher is not None
        config, opened = plan.config, inputs.teacher
        counts = plan.microbatches, config.train.micro_batch, config.data.sequence
        dtype = teacher_precision(config, compute)
        return cls(opened.architecture, opened, topology, *counts, dtype, inputs.documents(config))

    def teach(self, tokens: Tensor, contexts: Iterable[Context] | None, *_places: Tensor) -> Iterable[Context]:
        """The contexts of this rank's microbatches with the teacher's states. tokens: [batch, time]."""
        contexts = contexts or [DENSE] * self.count
        if self.in_pipeline:
            states = self._forward(tokens)
            return self._with(contexts, states) if states else contexts  # only the last stage has and reads them
        return self._with(contexts, (self._forward(rows)[0] for rows in tokens.chunk(self.count)))

    def _with(self, contexts: Iterable[Context], states: Iterable[Tensor]) -> Iterable[Context]:
        for context, found in zip(contexts, states, strict=True):
            yield replace(context, teacher=TeacherStates(found, self.readout.head))

    def _forward(self, tokens: Tensor) -> list[Tensor]:
        """Final states by microbatch. Layers go back to their shards; the head stays whole, to be read in the step."""
        states = self.engine.forward(tokens, tokens, [DENSE] * self.engine.count)
        self.engine.reshard(outside=False)
        return states
