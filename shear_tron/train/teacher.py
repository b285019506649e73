"""A teacher is a second list of stages, in the same layout, run forward only before each step."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.model.context import DENSE, Context
from shear_tron.model.distill import Distill, HandOver
from shear_tron.model.flops import flops
from shear_tron.model.readout import NEXT_TOKEN, Readout
from shear_tron.parallel.data import Weights, shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Topology
from shear_tron.train.config import RunConfig


def teacher_precision(config: RunConfig, compute: torch.dtype) -> torch.dtype:
    """The dtype of the teacher's weights and activations; compute: that of training."""
    chosen = config.distill.precision if config.distill else "auto"
    return compute if chosen == "auto" else {"bfloat16": torch.bfloat16, "float32": torch.float32}[chosen]


def readout_of(config: RunConfig) -> Readout:
    """What a run makes of its final states: the next-token loss, or with it the divergence from a teacher."""
    return Distill(config.distill.alpha, config.distill.temperature) if config.distill else NEXT_TOKEN


class Teacher:
    """Gives the microbatches of a step their teacher's final states, on ranks that hold the last stage.

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
        self.hand_over = HandOver()
        stages = build_stages(architecture, topology, "none", self.hand_over)
        stages = [shard(stage, weights, topology, compute, compute) for stage in stages]
        for stage in stages:
            stage.requires_grad_(False)
        self.engine = Engine(stages, topology, count, micro_batch, time, compute, documents)
        tokens, layers = count * micro_batch * time * topology.layout.dp, range(architecture.shape.layers)
        self.flops = flops(architecture, layers, True, tokens, time) // 3  # of a step on all ranks; no backward

    def teach(self, tokens: Tensor, labels: Tensor, contexts: Sequence[Context] | None) -> list[Context]:
        """The contexts of this rank's microbatches with the teacher's states. tokens, labels: [batch, time]."""
        self.hand_over.given = []
        self.engine.evaluate(tokens, labels, DENSE)
        contexts, given = contexts or [DENSE] * self.engine.count, self.hand_over.given
        if not given:  # another pipeline rank has the last stage
            return list(contexts)
        return [replace(context, teacher=states) for context, states in zip(contexts, given, strict=True)]
