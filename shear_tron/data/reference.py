"""What loss a domain should reach: predicted from larger models' losses, or measured.

The paper (section 2.2 and appendix A) predicts a target's reference loss by a scaling curve through the losses of
LLaMA-2 7B, 13B and 70B, or takes the source model's own loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger

import numpy as np

log = getLogger(__name__)

STEEPEST, FLATTEST = 3.0, 1e-4  # exponents searched


@dataclass(frozen=True)
class Curve:
    """``L(N) = floor + scale / N**exponent`` nats a token, for N parameters (Hoffmann et al. 2022, at fixed tokens)."""

    floor: float
    scale: float
    exponent: float

    def loss(self, parameters: float) -> float:
        return self.floor + self.scale * math.exp(-self.exponent * math.log(parameters))

    @classmethod
    def fit(cls, parameters: Sequence[float], losses: Sequence[float]) -> "Curve":
        """The least-squares curve, exact through three points. Raises ValueError for fewer than three sizes, or losses
        that do not fall as models grow."""
        sizes, values = np.asarray(parameters, np.float64), np.asarray(losses, np.float64)
        if sizes.shape != values.shape or len(np.unique(sizes)) < 3:
            raise ValueError(
                f"a scaling curve has three unknowns; give losses of three sizes, not of {list(parameters)}"
            )
        if not (np.isfinite(values).all() and (sizes > 0).all()):
            raise ValueError(
                f"losses {list(losses)} of sizes {list(parameters)} must be finite numbers and positive sizes"
            )
        logarithm = np.log(sizes / sizes.min())

        def solve(exponent: float) -> tuple[float, float, float]:
            """Given the exponent, floor and scale are linear: (squared error, floor, scale at the smallest size)."""
            design = np.stack([np.ones_like(sizes), np.exp(-exponent * logarithm)], axis=1)
            (floor, scale), *_ = np.linalg.lstsq(design, values, rcond=None)
            return float(((design @ [floor, scale] - values) ** 2).sum()), float(floor), float(scale)

        grid = np.geomspace(FLATTEST, STEEPEST, 400)
        best = int(np.argmin([solve(exponent)[0] for exponent in grid]))
        exponent = _minimise(lambda x: solve(x)[0], grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
        _, floor, scale = solve(exponent)
        if scale <= 0:
            raise ValueError(
                f"losses {list(losses)} do not fall with sizes {list(parameters)}; no scaling curve fits them"
            )
        if best in (0, len(grid) - 1):
            log.warning("losses %s hardly bend with size: the exponent is at the edge of its range", list(losses))
        return cls(floor, scale * float(sizes.min()) ** exponent, exponent)


def _minimise(function: Callable[[float], float], low: float, high: float) -> float:
    """Golden-section search."""
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(100):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, second) if function(first) < function(second) else (first, high)
    return float((low + high) / 2)


def predict(losses: Mapping[float, Mapping[str, float]], parameters: float) -> dict[str, float]:
    """Each domain's reference loss for a model of ``parameters``, from ``losses[size][domain]`` of larger or smaller
    ones. Raises ValueError when a size lacks a domain that another has."""
    sizes = sorted(losses)
    names = list(dict.fromkeys(name for size in sizes for name in losses[size]))
    for size in sizes:
        if absent := [name for name in names if name not in losses[size]]:
            raise ValueError(
                f"the model of {size:.0f} parameters has no loss of {', '.join(absent)}; measure it there too"
            )
    return {name: Curve.fit(sizes, [losses[size][name] for size in sizes]).loss(parameters) for name in names}
