"""What a rule goes by, what it may remember, and what a rule is."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float64]  # a number for each domain
Memory = Weights | None  # None before the first update, and always for a rule without memory


@dataclass(frozen=True)
class Evidence:
    """One evaluation. All fields are [domains], in one order."""

    losses: Weights  # held out, nats per token, finite
    references: Weights
    weights: Weights  # up to now; they sum to 1
    start: Weights  # at the run's start; they sum to 1

    @property
    def excess(self) -> Weights:
        return self.losses - self.references


class Rule(Protocol):
    """A small configuration with one pure function. Bounds on what it returns are ``Mixture``'s."""

    def update(self, evidence: Evidence, memory: Memory) -> tuple[Weights, Memory]:
        """The new weights (a distribution), and what to remember until the next update."""
        ...
