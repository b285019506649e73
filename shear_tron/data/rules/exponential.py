"""Weights times the exponential of what their domains are behind: what ``algorithm1`` and ``unclipped`` share."""

from logging import getLogger

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from shear_tron.data.rules.evidence import Weights

log = getLogger(__name__)


class Exponential(BaseModel):
    """``w * exp(step_size * excess)``, normalised; then a share ``smoothing`` is spread evenly, as released."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_size: float = Field(default=1.0, gt=0)  # scales the exponent
    smoothing: float = Field(default=1e-4, ge=0, lt=1)  # share spread evenly after an update
    # The most by which one update may change the ratio of two weights: exponents that would do more are all scaled
    # down alike, so the order of the domains stays. None: no bound, as in the paper, whose excess is tenths of a nat.
    max_ratio: float | None = Field(default=None, gt=1)

    def raised(self, weights: Weights, excess: Weights) -> Weights:
        exponent = self.step_size * excess
        spread = float(exponent.max() - exponent.min())
        if self.max_ratio is not None and spread > np.log(self.max_ratio):
            exponent = exponent * (np.log(self.max_ratio) / spread)
        elif self.max_ratio is None and spread > 1:
            log.warning(
                "excess losses are up to %.1f nats apart: this update changes the ratio of two weights by a factor of "
                "%.3g, and a few more like it leave one domain; set max_ratio (docs/data.md)",
                spread / self.step_size,
                np.exp(min(spread, 700.0)),
            )
        raised: Weights = weights * np.exp(exponent - exponent.max())  # the maximum cancels, and keeps exp finite
        smoothed: Weights = (1 - self.smoothing) * raised / raised.sum() + self.smoothing / len(weights)
        return smoothed
