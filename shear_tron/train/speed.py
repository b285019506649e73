"""What a pruning step costs next to a dense one: the share of units kept, operations done, time taken."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shear_tron.masks import Masks
from shear_tron.model.context import DENSE, Context
from shear_tron.model.flops import flops
from shear_tron.parallel import sync
from shear_tron.parallel.pipeline import Engine
from shear_tron.parallel.tensor import shape_of_part
from shear_tron.parallel.topology import Topology


class StepCost:
    """Measures dense steps once and compares every pruning step with them."""

    def __init__(self, engine: Engine, topology: Topology, tokens: int, sequence: int) -> None:
        """tokens: of a microbatch, in sequences of length ``sequence``."""
        self.engine, self.topology, self.tokens, self.sequence = engine, topology, tokens, sequence
        self.dense_flops = self._flops([DENSE] * engine.count)
        self.dense_seconds = 0.0

    def time_dense(self, tokens: Tensor, labels: Tensor) -> None:
        """Time forward and backward without masks on this rank's share of a batch; the gradients are thrown away.

        The second of two runs counts, the first also sets up.
        """
        for _ in range(2):
            start = time.perf_counter()
            losses = self.engine.train(tokens, labels, None)
            sync.sum_over_ranks(
                torch.zeros(()) if losses is None else losses.mean().cpu(), self.topology
            )  # all are done
            self.dense_seconds = time.perf_counter() - start
            for stage in self.engine.stages:
                stage.zero_grad()

    def report(
        self, sampled: Sequence[Masks], gated: Sequence[Context], seconds: float, pruned_seconds: float
    ) -> dict[str, object]:
        """For the log. ``kept``: mean share of gates that are not 0, by kind; ``flops``: of the whole step on all ranks
        (``shear_tron.model.flops``); ``flops_to_dense``; ``seconds_to_dense``: ``seconds`` of the whole step, of which
        ``pruned_seconds`` went by from sampling masks to their gradients, over what it would be with dense ones."""
        kept = torch.tensor([[(mask != 0).double().mean() for _, mask in masks.items()] for masks in sampled]).mean(0)
        sums = torch.cat((kept, torch.tensor([1.0, self._flops(gated), self.dense_flops])))
        *shares, ranks, done, dense = sync.sum_over_ranks(sums.double(), self.topology).tolist()
        return {
            "kept": {kind: share / ranks for (kind, _), share in zip(sampled[0].items(), shares, strict=True)},
            "flops": done,
            "flops_to_dense": done / dense,
            "seconds_to_dense": seconds / (seconds - pruned_seconds + self.dense_seconds),
        }

    def _flops(self, gated: Sequence[Context]) -> float:
        """Of this rank's stages."""
        total = 0
        for stage in self.engine.stages:
            shape = shape_of_part(stage.architecture.shape, self.topology.layout.tp)
            part = replace(stage.architecture, shape=shape)
            layers = [int(number) for number in stage.layers]
            for under in gated:
                total += flops(part, layers, stage.is_last, self.tokens, self.sequence, under.keep)
        return float(total)
