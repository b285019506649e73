"""Units by score, with exact counts: at every step the largest scores are kept, and what is closed stays closed.

Scores come from the weights, from activations, from chance (``shear_tron.pruning.scores``), or from gradients: the
Fisher score of a unit is the mean of (dL/dz)^2 over microbatches, with z its mask, and estimates to second order what
closing it costs. No noise, no multipliers; an open unit's mask is exactly 1.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.masks import Masks
from shear_tron.pruning.constraint import sparsity_report
from shear_tron.pruning.counts import Counts
from shear_tron.pruning.method import Method, Ranks
from shear_tron.shape import Shape

CLOSED = -1.0  # the score of a closed unit; an open one's is 0 or more


class Scored(Method):
    """Scores of all units that may be pruned, and how many are kept when.

    Args:
        source, target, balance: as for ``Counts``, the source with the facts of its forward pass.
        warmup_steps: at step t a share ``1 - (1 - t / warmup_steps)**3`` of the units to close is closed, all of them
            from ``warmup_steps`` on; 0: all of them before the first step.
        decay: of the running mean of Fisher scores, a microbatch; None: scores are set once and stay.
        calibration_batches: batches seen before the first step, as steps -calibration_batches to -1, all units open.
            All their microbatches count alike.
        dtype: of masks and scores.
        rotated: hidden dimensions are principal axes, whose scores are their energies (``set_energy``).

    ``scores`` maps a kind to a tensor of the size of its mask; closed units hold CLOSED.
    """

    def __init__(
        self,
        source: Architecture,
        target: Shape,
        warmup_steps: int,
        decay: float | None = None,
        calibration_batches: int = 0,
        balance: int = 1,
        dtype: torch.dtype = torch.float32,
        rotated: bool = False,
    ) -> None:
        self.source, self.warmup_steps, self.decay = source, warmup_steps, decay
        self.calibration_batches, self.dtype = calibration_batches, dtype
        self.counts = Counts(source.shape, target, balance)
        self.scores = {kind: torch.zeros(size, dtype=dtype) for kind, size in self.counts.sizes.items()}
        self.energy = torch.ones(self.counts.sizes["hidden"], dtype=dtype) if rotated else None
        self._learned: dict[str, Tensor] = {}
        self._step = 0

    def set_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Take scores, 0 or more, from elsewhere, of open units only."""
        for kind, own in self._scored():
            own.copy_(torch.where(own == CLOSED, CLOSED, scores[kind].to(self.dtype)))

    def set_energy(self, energy: Tensor) -> None:
        """Take the energies of the principal axes that the hidden dimensions are, the largest first."""
        assert self.energy is not None
        self.energy.copy_(energy)

    def close(self, step: int) -> None:
        """Close the units that are not to be open at ``step``."""
        if self.energy is not None:
            own = self.scores["hidden"]
            own.copy_(torch.where(own == CLOSED, CLOSED, self.energy))
        progress = 1 - (1 - min(1.0, step / self.warmup_steps)) ** 3 if self.warmup_steps else 1.0
        for kind, scores in self.scores.items():
            scores[~self.counts.largest(kind, scores, progress)] = CLOSED

    def sample(self, step: int, microbatch: int) -> Masks:
        return self.decide_now()

    def learn(
        self, step: int, microbatches: range, of: int, sampled: Sequence[Masks],
        gradients: Sequence[Mapping[str, Tensor]], ranks: Ranks,
    ) -> dict[str, Any]:  # fmt: skip
        self._step = step
        if self.decay is not None:
            self._learned = self._fisher(step, microbatches, of, gradients, ranks)
        return sparsity_report(self.expected(), self.source)

    def _fisher(
        self, step: int, microbatches: range, of: int, gradients: Sequence[Mapping[str, Tensor]], ranks: Ranks
    ) -> dict[str, Tensor]:
        """The scores after this step's microbatches, as if they had come one after the other."""
        own = len(microbatches)
        flat = [
            torch.cat([found[kind].flatten() if kind in found else torch.zeros(prod(size), dtype=self.dtype)
                       for kind, size in self.counts.sizes.items()])
            for found in gradients
        ]  # fmt: skip
        gradient = ranks.whole(torch.stack(flat)) * own  # [microbatches, units], whole before it is squared
        kept, weights = self._weights(step, of)
        found = torch.tensor(weights[microbatches.start : microbatches.stop], dtype=self.dtype) @ gradient.square()
        found = ranks.mean(found) * (of // own)
        parts = torch.split(found, [prod(size) for size in self.counts.sizes.values()])
        pairs = zip(self.scores.items(), parts, strict=True)
        return {kind: kept * scores + part.view_as(scores) for (kind, scores), part in pairs}

    def _weights(self, step: int, of: int) -> tuple[float, list[float]]:
        """What is left of the scores after a step of ``of`` microbatches, and the weight of each in the new scores."""
        assert self.decay is not None
        kept = 1.0
        weights: list[float] = []
        for microbatch in range(of):
            seen = (step + self.calibration_batches) * of + microbatch + 1  # the first ones make a plain mean
            share = 1 / seen if step < 0 else max(1 / seen, 1 - self.decay)
            weights = [weight * (1 - share) for weight in weights] + [share]
            kept *= 1 - share
        return kept, weights

    def advance(self) -> None:
        for kind, own in self._scored():
            if kind in self._learned:
                own.copy_(torch.where(own == CLOSED, CLOSED, self._learned[kind]))
        if self._step >= 0:
            self.close(self._step + 1)

    def decide(self) -> Masks:
        return self._masks({kind: self.counts.largest(kind, scores) for kind, scores in self.scores.items()})

    def decide_now(self) -> Masks:
        return self._masks({kind: scores != CLOSED for kind, scores in self.scores.items()})

    def expected(self) -> Masks:
        return Masks(**{kind: (scores != CLOSED).to(self.dtype) for kind, scores in self.scores.items()})

    def _masks(self, kept: Mapping[str, Tensor]) -> Masks:
        """1 where kept. Principal axes get one value that makes up for the energy lost, of norms over fewer dimensions:
        the stream's scale is the norms' to forget, so what is left of it is their outputs times this value."""
        masks = {kind: open_.to(self.dtype) for kind, open_ in kept.items()}
        if self.energy is not None:
            share = self.energy[kept["hidden"]].sum() / self.energy.sum()
            masks["hidden"] *= (share / masks["hidden"].mean()).sqrt()
        return Masks(**masks)

    def _scored(self) -> list[tuple[str, Tensor]]:
        """The kinds whose scores are not their energies."""
        return [(kind, own) for kind, own in self.scores.items() if self.energy is None or kind != "hidden"]

    def tensors(self) -> dict[str, Tensor]:
        found = {f"scores.{kind}": scores for kind, scores in self.scores.items()}
        return found if self.energy is None else found | {"rotation.energy": self.energy}

    def is_finite(self) -> bool:
        return all(bool(learned.isfinite().all()) for learned in self._learned.values())
