"""The paper's way of making masks: hard-concrete gates, learned under Lagrange constraints (section 2.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shear_tron.masks import Masks
from shear_tron.pruning.constraint import Constraint, parameter_groups
from shear_tron.pruning.gates import Gates
from shear_tron.pruning.method import Method, Ranks


class HardConcrete(Method):
    """Gates and multipliers. ``learn`` pulls the masks' gradients through the sampler and adds the constraint's."""

    def __init__(self, gates: Gates, constraint: Constraint) -> None:
        self.gates, self.constraint = gates, constraint

    def sample(self, step: int, microbatch: int) -> Masks:
        return self.gates.sample(step, microbatch)

    def learn(
        self, step: int, microbatches: range, of: int, sampled: Sequence[Masks],
        gradients: Sequence[Mapping[str, Tensor]], ranks: Ranks,
    ) -> dict[str, Any]:  # fmt: skip
        for parameter in self.parameters().values():
            parameter.grad = None
        for logits in self.gates.logits.values():
            logits.grad = torch.zeros_like(logits)
        ends: list[Tensor] = []
        grads: list[Tensor] = []
        for masks, found in zip(sampled, gradients, strict=True):
            for kind, mask in masks.items():
                if kind in found:
                    ends.append(mask)
                    grads.append(found[kind])
        if ends:  # a rank may hold only layers that were left out
            torch.autograd.backward(ends, grads)
        ranks.gradient([logits.grad for logits in self.gates.logits.values() if logits.grad is not None])
        penalty, report = self.constraint.penalty(self.gates, step)
        penalty.backward()  # type: ignore[no-untyped-call]
        multipliers = {kind: pair.tolist() for kind, pair in self.constraint.multipliers.items()}
        return {**report, "multipliers": multipliers}

    def advance(self) -> None:
        self.gates.clamp_()

    def decide(self) -> Masks:
        return self.gates.decide()

    def decide_now(self) -> Masks:
        return self.gates.decide_expected()

    def expected(self) -> Masks:
        return self.gates.expected()

    def parameters(self) -> dict[str, Tensor]:
        logits: dict[str, Tensor] = {f"gates.{kind}": logits for kind, logits in self.gates.logits.items()}
        return logits | {f"multipliers.{kind}": pair for kind, pair in self.constraint.multipliers.items()}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return parameter_groups(self.gates, self.constraint, learning_rate)

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters().items()}
