"""The learning of masks within a training step: sample, pull gradients back, add the constraint, step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.keep import Keep
from shear_tron.masks import Masks
from shear_tron.model.context import Context
from shear_tron.parallel import sync
from shear_tron.parallel.tensor import keep_part
from shear_tron.parallel.topology import Topology
from shear_tron.pruning.config import PruneConfig
from shear_tron.pruning.constraint import Constraint, parameter_groups
from shear_tron.pruning.gates import Gates
from shear_tron.shape import Shape
from shear_tron.train.optimizer import moments, start_moments

# Kept counts are padded up to a multiple of this: what matrix units like. On 2 CPU cores at hidden 1024, gates halfway,
# forward and backward took 8.2 s unpadded, 6.2 s at 16 and 6.5 s at 64 (gates closed: 2.6, 2.2 and 2.4 s).
PAD_TO = {"cuda": 64, "cpu": 16}
# Copying so large a share costs more than the rest saves: 3 % of a step with all gates open.
WHOLE = 15 / 16


class Pruner:
    """Gates and multipliers with their optimizer, alike on every rank.

    Within a step the model sees detached masks of each microbatch, leaves. ``backward`` then takes the gradients
    they gathered through the sampler, once, sums them over ranks and adds the Lagrangian's.
    """

    def __init__(
        self,
        source: Architecture,
        target: Shape,
        config: PruneConfig,
        seed: int,
        topology: Topology,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.topology, self.source = topology, source.shape
        self.compact = config.compact
        self.pad_to = config.pad_to or PAD_TO[topology.device.type]
        self.gates = Gates(source.shape, target, seed, dtype, config.balance)
        self.constraint = Constraint(source, target, config.warmup_steps, dtype)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.gates, self.constraint, config.learning_rate))
        self.rate = config.learning_rate

    def sample(self, step: int, microbatches: range) -> tuple[list[Masks], list[Context]]:
        """Masks of microbatches of the global batch, on the host with a graph and, as leaves, on the device."""
        sampled = [self.gates.sample(step, number) for number in microbatches]
        return sampled, [Context(masks.map(self._leaf), self._keep(masks)) for masks in sampled]

    def decided(self, final: bool) -> Context:
        """The masks of evaluations: those of the target's counts, or of the counts expected by now."""
        masks = self.gates.decide() if final else self.gates.decide_expected()
        return Context(masks.map(lambda mask: mask.to(self.topology.device)), self._keep(masks))

    def _leaf(self, mask: Tensor) -> Tensor:
        return mask.detach().to(self.topology.device, copy=True).requires_grad_()

    def _keep(self, masks: Masks) -> Keep | None:
        layout, rank = self.topology.layout, self.topology.tp_rank
        if not self.compact:
            return None
        return keep_part(masks, self.source, rank, layout.tp, self.pad_to, self.topology.device, WHOLE)

    def backward(self, step: int, sampled: Sequence[Masks], gated: Sequence[Context]) -> dict[str, Any]:
        """Set the gradients of logits and multipliers. Returns the constraint's report and the multipliers."""
        self.optimizer.zero_grad()
        for logits in self.gates.logits.values():
            logits.grad = torch.zeros_like(logits)
        ends: list[Tensor] = []
        grads: list[Tensor] = []
        for masks, under in zip(sampled, gated, strict=True):
            for (_, mask), (_, leaf) in zip(masks.items(), under.masks.items(), strict=True):
                if leaf.grad is not None:
                    ends.append(mask)
                    grads.append(leaf.grad.to(mask.device))
        if ends:  # a rank may hold only layers that were left out
            torch.autograd.backward(ends, grads)
        sync.sum_parts_mean_data([p.grad for p in self.gates.logits.values() if p.grad is not None], self.topology)
        penalty, report = self.constraint.penalty(self.gates, step)
        penalty.backward()  # type: ignore[no-untyped-call]
        multipliers = {kind: pair.tolist() for kind, pair in self.constraint.multipliers.items()}
        return {**report, "multipliers": multipliers}

    def step(self, rate_factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_factor
        self.optimizer.step()
        self.gates.clamp_()

    def tensors(self) -> dict[str, Tensor]:
        """Everything to checkpoint, by name; the tensors themselves."""
        found = {}
        for kind, logits in self.gates.logits.items():
            found[f"gates.{kind}"] = logits.detach()
            found |= moments(self.optimizer, {f"gates.{kind}": logits})
        for kind, pair in self.constraint.multipliers.items():
            found[f"multipliers.{kind}"] = pair.detach()
            found |= moments(self.optimizer, {f"multipliers.{kind}": pair})
        return found

    def begin_at(self, step: int) -> None:
        start_moments(self.optimizer, step)
