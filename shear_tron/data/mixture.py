"""Domain weights that follow the loss (Sheared LLaMA, section 2.2), by a rule, within bounds."""

import math
from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from shear_tron.data.rules.algorithm1 import Algorithm1
from shear_tron.data.rules.constant import Constant
from shear_tron.data.rules.dro import Dro
from shear_tron.data.rules.evidence import Evidence, Memory, Rule, Weights
from shear_tron.data.rules.unclipped import Unclipped

log = getLogger(__name__)


class MixtureConfig(BaseModel):
    """Which rule moves the weights, the rule's own section, and bounds that hold whatever it says.

    ``algorithm1``: the paper's. ``unclipped``: the authors' released code. ``constant``: the starting weights.
    ``dro``: the worst case around the starting weights. Each is a page of shear_tron/data/rules. Every update keeps
    weights within [floor, ceiling] and within ``max_change`` of the last ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    update: Literal["algorithm1", "unclipped", "constant", "dro"] = "algorithm1"  # the rule (docs/data.md)
    algorithm1: Algorithm1 = Algorithm1()
    unclipped: Unclipped = Unclipped()
    constant: Constant = Constant()
    dro: Dro = Dro()
    floor: float = Field(default=0.0, ge=0, lt=1)  # least weight of a domain
    ceiling: float = Field(default=1.0, gt=0, le=1)  # largest weight of a domain
    max_change: float = Field(default=1.0, gt=0, le=1)  # of a weight in one update

    @property
    def rule(self) -> Rule:
        rule: Rule = getattr(self, self.update)
        return rule


class Mixture:
    """Weights of ``names``, moved by ``update``. A function of its losses alone: ranks that see the same losses agree.

    Raises ValueError where the starting weights are no distribution (they are normalised), lie outside
    [floor, ceiling], or a domain has no reference loss.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: npt.ArrayLike,
        references: Mapping[str, float],
        config: MixtureConfig | None = None,
    ):
        self.names, self.config = tuple(names), config or MixtureConfig()
        start = np.array(weights, dtype=np.float64)
        if start.shape != (len(names),) or not np.isfinite(start).all() or start.min() < 0 or not start.any():
            raise ValueError(
                f"weights={start.tolist()} must be one number >= 0 for each of {', '.join(names)}, not all 0"
            )
        self.start: Weights = start / start.sum()
        self.weights: Weights = self.start.copy()
        self._memory: Memory = None  # the rule's
        if self.config.update != "constant":
            self._require_references(references)
            self._require_bounds()
        if self.config.update == "dro" and not self.start.all():
            raise ValueError("update=dro measures distance from the starting weights; make every one larger than 0")
        self.references = {name: float(references[name]) for name in names if name in references}

    def _require_references(self, references: Mapping[str, float]) -> None:
        for name in self.names:
            if not math.isfinite(references.get(name, math.nan)):
                raise ValueError(
                    f"domain {name!r} has no reference loss ({references.get(name)}); give one, measure the source "
                    "model's, or use update=constant"
                )
        for name in references:
            if name not in self.names:
                raise ValueError(f"reference loss of unknown domain {name!r}; use one of {', '.join(self.names)}")

    def _require_bounds(self) -> None:
        floor, ceiling, count = self.config.floor, self.config.ceiling, len(self.names)
        if floor * count > 1 or ceiling * count < 1:
            raise ValueError(
                f"floor={floor} and ceiling={ceiling} leave no weights for {count} domains; "
                f"use floor <= {1 / count:.4g} <= ceiling"
            )
        for name, weight in zip(self.names, self.weights.tolist(), strict=True):
            if not floor - 1e-9 <= weight <= ceiling + 1e-9:
                raise ValueError(f"weight {weight:.4g} of domain {name!r} is outside floor={floor}..ceiling={ceiling}")

    def update(self, losses: Mapping[str, float]) -> Weights:
        """New weights from each domain's held-out loss (nats per token). A copy; also in ``weights``.

        A domain whose loss is missing or not finite leaves all weights as they are, with a warning: raising or
        lowering the others would be a guess about it.
        """
        for name in losses:
            if name not in self.names:
                raise ValueError(f"loss of unknown domain {name!r}; use one of {', '.join(self.names)}")
        if self.config.update == "constant":
            return self.weights.copy()
        absent = [name for name in self.names if not math.isfinite(losses.get(name, math.nan))]
        if absent:
            log.warning("no finite held-out loss of %s; the mixture stays as it is", ", ".join(absent))
            return self.weights.copy()
        moved, self._memory = self.config.rule.update(self._evidence(losses), self._memory)
        self.weights = self._limit(moved)
        return self.weights.copy()

    def _evidence(self, losses: Mapping[str, float]) -> Evidence:
        found, references = (np.array([of[name] for name in self.names]) for of in (losses, self.references))
        return Evidence(found, references, self.weights, self.start)

    def _limit(self, weights: Weights) -> Weights:
        """The distribution within the bounds that keeps the proportions of ``weights``: ``clip(scale * weights)``."""
        config = self.config
        low = np.maximum(config.floor, self.weights - config.max_change)
        high = np.minimum(config.ceiling, self.weights + config.max_change)
        if (weights >= low).all() and (weights <= high).all():
            return np.asarray(weights / weights.sum())
        weights = np.maximum(weights, 1e-30)
        below, above = 0.0, float((high / weights).max())
        for _ in range(200):  # bisection on the scale: the clipped sum grows with it
            scale = (below + above) / 2
            if scale in (below, above):
                break
            below, above = (scale, above) if np.clip(scale * weights, low, high).sum() < 1 else (below, scale)
        return np.clip(above * weights, low, high)

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        numbers = {"weights": self.weights, "start": self.start, "memory": self._memory}
        return {key: self._named(values) for key, values in numbers.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises ValueError when it is of other domains."""
        if set(state["weights"]) != set(self.names):
            raise ValueError(f"the saved mixture is of {', '.join(state['weights'])}, not of {', '.join(self.names)}")
        self.weights, self.start = (self._array(state[key]) for key in ("weights", "start"))
        self._memory = self._array(state["memory"]) if state["memory"] else None

    def _named(self, values: Memory) -> dict[str, float]:
        return {} if values is None else dict(zip(self.names, values.tolist(), strict=True))

    def _array(self, values: Mapping[str, float]) -> Weights:
        return np.array([values[name] for name in self.names], dtype=np.float64)
