"""Domain weights that follow the loss (Sheared LLaMA, section 2.2 and Algorithm 1)."""

import math
from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shear_tron.data.dro import worst_case

Weights = npt.NDArray[np.float64]

log = getLogger(__name__)


class MixtureConfig(BaseModel):
    """How the weights follow the losses.

    ``algorithm1``: the paper's, ``w * exp(step_size * max(loss - reference, 0))``, normalised.
    ``unclipped``: the authors' released code, the same without the maximum: a domain better than its reference shrinks.
    ``constant``: the starting weights.
    ``dro``: the worst case around the starting weights, of losses averaged over updates (shear_tron/data/dro.py);
    ``step_size`` is how much of the way to it an update goes.

    After an exponential update a share ``smoothing`` is spread evenly, as the released code does. Every update keeps
    weights within [floor, ceiling] and within ``max_change`` of the last ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    update: Literal["algorithm1", "unclipped", "constant", "dro"] = "algorithm1"
    step_size: float = Field(default=1.0, gt=0)
    smoothing: float = Field(default=1e-4, ge=0, lt=1)
    floor: float = Field(default=0.0, ge=0, lt=1)
    ceiling: float = Field(default=1.0, gt=0, le=1)
    max_change: float = Field(default=1.0, gt=0, le=1)
    dro_radius: float = Field(default=0.05, gt=0)  # of the chi-square ball; the defaults are the released code's
    dro_minimum: float = Field(default=0.2, gt=0, lt=1)  # least share of its starting weight a domain keeps
    dro_memory: float = Field(default=0.9, ge=0, lt=1)  # of the moving average of losses

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.update == "dro" and self.step_size > 1:
            raise ValueError(f"step_size={self.step_size} goes past the worst case; with update=dro use at most 1")
        return self


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
        self._average: dict[str, float] = {}  # moving average of each loss, for dro
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
        """New weights from each domain's held-out loss (nats a token). A copy; also in ``weights``.

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
        moved = self._robust(losses) if self.config.update == "dro" else self._exponential(losses)
        self.weights = self._limit(moved)
        return self.weights.copy()

    def _exponential(self, losses: Mapping[str, float]) -> Weights:
        """Algorithm 1 of the paper, with the released code's smoothing."""
        excess = np.array([losses[name] - self.references[name] for name in self.names])
        if self.config.update == "algorithm1":
            excess = np.maximum(excess, 0.0)
        exponent = self.config.step_size * excess
        raised: Weights = self.weights * np.exp(exponent - exponent.max())  # the maximum cancels, and keeps exp finite
        smoothing = self.config.smoothing
        smoothed: Weights = (1 - smoothing) * raised / raised.sum() + smoothing / len(self.names)
        return smoothed

    def _robust(self, losses: Mapping[str, float]) -> Weights:
        for name in self.names:
            before = self._average.get(name, losses[name])
            self._average[name] = self.config.dro_memory * before + (1 - self.config.dro_memory) * losses[name]
        excess = np.array([self._average[name] - self.references[name] for name in self.names])
        worst = worst_case(excess, self.start, self.config.dro_radius, self.config.dro_minimum)
        moved: Weights = self.weights + self.config.step_size * (worst - self.weights)
        return moved

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
        return {"weights": dict(zip(self.names, self.weights.tolist(), strict=True)), "average": dict(self._average)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises ValueError when it is of other domains."""
        if set(state["weights"]) != set(self.names):
            raise ValueError(f"the saved mixture is of {', '.join(state['weights'])}, not of {', '.join(self.names)}")
        self.weights = np.array([state["weights"][name] for name in self.names], dtype=np.float64)
        self._average = {name: float(loss) for name, loss in state["average"].items()}
