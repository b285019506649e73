"""Minitron's scores of units (arXiv 2407.14679, section 2.2): by what they give, on some batches, nothing trained.

A feed-forward column scores the mean over tokens of its activation's size, a query head that of its output's norm, a
hidden dimension that of the norms' outputs, summed over norms; a layer its block influence, 1 - cos(stream before,
stream after). Key-value groups score as their heads together, places within groups as the heads at them.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from shear_tron.dims import sizes
from shear_tron.model.context import DENSE
from shear_tron.parallel import sync
from shear_tron.parallel.pipeline import Engine
from shear_tron.parallel.topology import Topology
from shear_tron.train.seeing import ENTER, seeing


def activation_scores(
    engine: Engine, batches: Sequence[tuple[Tensor, Tensor]], topology: Topology
) -> dict[str, Tensor]:
    """Scores by kind, float64, on the CPU, the same on all ranks in any layout. Collective.

    batches: this rank's (tokens, labels).
    """
    shape = engine.stages[0].architecture.shape
    scores = {
        kind: torch.zeros(size, dtype=torch.float64, device=topology.device) for kind, size in sizes(shape).items()
    }
    rank, parts = topology.tp_rank, topology.layout.tp
    tokens = sum(rows.numel() for rows, _ in batches) * topology.layout.dp

    def see(layer: int | None, what: str, x: Tensor) -> None:
        wide = x.detach().double()
        if what == ENTER:
            if rank == 0:  # tensor-parallel ranks see the same
                scores["hidden"] += wide.abs().sum(0)
        elif what == "down":
            scores["ffn"][layer].view(parts, -1)[rank] += wide.abs().sum(0)
        else:
            heads = wide.view(len(wide), -1, shape.head_dim).norm(dim=-1).sum(0).view(-1, shape.heads_per_group)
            scores["kv_heads"][layer].view(parts, -1)[rank] += heads.sum(1)
            scores["heads_per_group"][layer] += heads.sum(0)

    def influence(number: int) -> Any:
        def hook(_module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if rank == 0 or engine.stages[0].split.sequence:  # then ranks hold tokens of their own
                before, after = inputs[0].detach().double(), output.detach().double()
                scores["layers"][number] += (1 - torch.cosine_similarity(before, after)).sum()

        return hook

    with ExitStack() as stack:
        stack.enter_context(seeing(engine.stages, see))
        for stage in engine.stages:
            for number, layer in stage.layers.items():
                stack.callback(layer.register_forward_hook(influence(int(number))).remove)
        for rows, labels in batches:
            engine.evaluate(rows, labels, DENSE)
    return {kind: sync.sum_over_ranks(own, topology) / tokens for kind, own in scores.items()}
