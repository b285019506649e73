"""The learning rate over a run."""

import math

from shear_tron.train.config import RunConfig


def learning_rate_factor(step: int, steps: int, warmup: int, minimum: float) -> float:
    """Share of the peak rate at ``step`` of ``steps``: linear over ``warmup`` steps, then a cosine down to ``minimum``.

    As in the paper (section 3.1): the last step has ``minimum`` of the peak, 0.1 by default.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def rate_factor(config: RunConfig, step: int) -> float:
    """``learning_rate_factor`` at ``step`` of a run, which may be a part of a longer schedule."""
    optimizer = config.optimizer
    steps, before = config.train.steps, 0
    if optimizer.schedule:
        steps, before = optimizer.schedule.steps, optimizer.schedule.before
    return learning_rate_factor(before + step, steps, optimizer.warmup_steps, optimizer.min_learning_rate)
