"""The Lagrange constraint that pulls the gates to the target's shape.

Sheared LLaMA (arXiv 2310.06694, section 2.1): minimise the loss over logits and maximise it over multipliers of

    linear * (sparsity - wanted) + quadratic * (sparsity - wanted)**2

for each kind of structure, where ``sparsity`` is the expected fraction of its units that are closed. Everything is
computed from the replicated logits, so every rank gets the same numbers without a collective.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import Dim, sizes
from shear_tron.masks import Masks
from shear_tron.params import matrices
from shear_tron.pruning.counts import pruned_kinds
from shear_tron.pruning.gates import Gates, copy_into
from shear_tron.shape import Shape


class Constraint:
    """The multipliers, one pair (linear, quadratic) for each kind that is pruned, and the penalty they make.

    Args:
        source: the model before.
        target: the shape after.
        warmup_steps: steps over which the wanted sparsity grows linearly from 0 to the target's.
        dtype: of the multipliers.

    ``multipliers`` maps a kind to a parameter of size [2] on the CPU, alike on every rank; they start at 0.
    """

    def __init__(
        self, source: Architecture, target: Shape, warmup_steps: int, dtype: torch.dtype = torch.float32
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps} is negative; use 0 or more (the paper: 640 of 3200 steps)")
        kinds = pruned_kinds(source.shape, target)
        self.source = source
        self.warmup_steps = warmup_steps
        self.sparsity = {kind: 1 - count / sizes(source.shape)[kind][-1] for kind, count in kinds.items()}
        self.total_sparsity = 1 - _matrix_parameters(source.resized(target)) / _matrix_parameters(source)
        self.multipliers = {kind: torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for kind in kinds}

    def wanted(self, step: int) -> dict[str, float]:
        """Sparsity to hold at ``step``, by kind: the target's after the warm-up."""
        return {kind: sparsity * self._progress(step) for kind, sparsity in self.sparsity.items()}

    def penalty(self, gates: Gates, step: int) -> tuple[Tensor, dict[str, float]]:
        """The Lagrangian of ``gates`` at ``step``, 0-d, differentiable in logits and multipliers, and what to log.

        A kind that exists in every layer is measured in each (and there in each block of ``Gates``' balance) and its
        penalty averaged, so that the square holds every one of them to the target. The report has
        ``expected_KIND_sparsity`` and ``target_KIND_sparsity`` by kind, and ``expected_sparsity`` and
        ``target_sparsity`` of the parameters in the layers' matrices.
        """
        expected = gates.expected()
        wanted = self.wanted(step)
        total = torch.zeros(())
        report = {}
        for kind, probabilities in expected.items():
            sparsity = 1 - gates.blocks(kind, probabilities).mean(-1)  # [blocks] or [layers, blocks]
            linear, quadratic = self.multipliers[kind]
            excess = sparsity - wanted[kind]
            total = total + (linear * excess + quadratic * excess.square()).mean()
            report[f"expected_{kind}_sparsity"] = sparsity.mean().item()
            report[f"target_{kind}_sparsity"] = wanted[kind]
        kept = _expected_matrix_parameters(expected, self.source).item()
        report["expected_sparsity"] = 1 - kept / _matrix_parameters(self.source)
        report["target_sparsity"] = self.total_sparsity * self._progress(step)
        return total, report

    def state_dict(self) -> dict[str, Tensor]:
        """The multipliers as plain tensors, by kind. They share memory with the parameters."""
        return {kind: pair.detach() for kind, pair in self.multipliers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the multipliers; ValueError unless kinds and sizes are exactly these."""
        copy_into(self.multipliers, state)

    def _progress(self, step: int) -> float:
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


def parameter_groups(gates: Gates, constraint: Constraint, lr: float = 1.0) -> list[dict[str, Any]]:
    """Groups for ``torch.optim.AdamW``: logits descend and multipliers ascend at rate ``lr`` (the paper: 1.0 for both).

    No weight decay; betas and eps as in the released code. Ascent is the optimizer's ``maximize``, which does what the
    released code's negative rate does.
    """
    common = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    return [
        {"params": list(gates.logits.values()), "maximize": False, **common},
        {"params": list(constraint.multipliers.values()), "maximize": True, **common},
    ]


def sparsity_report(masks: Masks, source: Architecture) -> dict[str, float]:
    """What ``Constraint.penalty`` reports, of masks that are what is wanted: expected and target are the same."""
    closed = {f"{kind}_sparsity": 1 - mask.double().mean().item() for kind, mask in masks.items()}
    kept = _expected_matrix_parameters(masks, source).item()
    closed["sparsity"] = 1 - kept / _matrix_parameters(source)
    return {f"{which}_{name}": share for which in ("expected", "target") for name, share in closed.items()}


def _matrix_parameters(architecture: Architecture) -> int:
    shape = architecture.shape
    return shape.layers * sum(prod(row.size(shape)) for row in matrices(architecture))


def _expected_matrix_parameters(expected: Masks, architecture: Architecture) -> Tensor:
    """Mean number of parameters that act in the layers' matrices, 0-d. Gates are independent, so means multiply."""
    shape = architecture.shape
    full = {kind: torch.ones(size) for kind, size in sizes(shape).items()} | dict(expected.items())
    kv_heads = full["kv_heads"].sum(-1)  # [layers], as are the next two
    length = {
        Dim.HIDDEN: full["hidden"].sum(),
        Dim.HEADS: kv_heads * full["heads_per_group"].sum(-1) * shape.head_dim,
        Dim.KV_HEADS: kv_heads * shape.head_dim,
        Dim.FFN: full["ffn"].sum(-1),
    }
    in_layer = sum(length[row.dims[0]] * length[row.dims[1]] for row in matrices(architecture))
    return (full["layers"] * in_layer).sum()
