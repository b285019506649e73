"""Distributionally robust domain weights: the worst case within a ball around a prior mixture.

DRPruning (Deng et al., ACL 2025, section 3.1, after Oren et al. 2019 and Zhou et al. 2021) trains on
``argmax_q sum(q * excess)`` over the q whose chi-square divergence ``sum(prior * (q / prior - 1)**2) / 2`` from the
prior is at most ``radius``, where no domain falls below ``minimum`` times its prior.
"""

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from shear_tron.data.rules.evidence import Evidence, Memory, Weights

ALIKE = 1e-9  # nats: differences below are rounding


class Dro(BaseModel):
    """Towards the worst case around the starting weights, for moving averages of the losses, which are its memory.

    The defaults of ``radius``, ``minimum`` and ``decay`` are the released code's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_size: float = Field(default=1.0, gt=0, le=1)  # how much of the way to the worst case an update goes
    radius: float = Field(default=0.05, gt=0)  # of the chi-square ball
    minimum: float = Field(default=0.2, gt=0, lt=1)  # least share of its starting weight a domain keeps
    decay: float = Field(default=0.9, ge=0, lt=1)  # of the moving average of losses

    def update(self, evidence: Evidence, memory: Memory) -> tuple[Weights, Memory]:
        before = evidence.losses if memory is None else memory
        average: Weights = self.decay * before + (1 - self.decay) * evidence.losses
        worst = worst_case(average - evidence.references, evidence.start, self.radius, self.minimum)
        moved: Weights = evidence.weights + self.step_size * (worst - evidence.weights)
        return moved, average


def worst_case(excess: Weights, prior: Weights, radius: float, minimum: float) -> Weights:
    """The maximising q: ``prior * max(excess - eta, 0)``, raised to the minimum, with eta set by the ball.

    All arrays are [domains]; ``prior`` sums to 1. Adding a constant to ``excess`` changes nothing, so neither does a
    reference that is too high everywhere (the released code searches another reference for that case). Equal excess
    gives the prior; any spread, however small, gives a q at the edge of the ball, or as near to it as the minimum lets.
    """
    below = excess.max() - excess  # 0 for the worst domain
    if below.max() < ALIKE:
        return prior.copy()

    def weights(distance: float) -> Weights:  # eta = excess.max() - distance
        ratio = np.maximum(distance - below, 0.0)
        ratio = np.maximum(ratio / (ratio * prior).sum(), minimum)
        result: Weights = ratio * prior / (ratio * prior).sum()
        return result

    def divergence(distance: float) -> float:
        return float((prior * (weights(distance) / prior - 1) ** 2).sum() / 2)

    near, far = float(below[below > 0].min()) * 1e-9, float(below.max())
    if divergence(near) <= radius:
        return weights(near)
    while divergence(far) > radius:
        far *= 2
    for _ in range(200):  # the divergence falls as eta moves away from the worst domain
        middle = (near + far) / 2
        if middle in (near, far):
            break
        near, far = (middle, far) if divergence(middle) > radius else (near, middle)
    return weights(far)
