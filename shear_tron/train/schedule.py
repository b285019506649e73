"""The learning rate over a run."""

import math


def learning_rate_factor(step: int, steps: int, warmup: int, minimum: float) -> float:
    """Share of the peak rate at ``step`` of ``steps``: linear over ``warmup`` steps, then a cosine down to ``minimum``.

    As in the paper (section 3.1): the last step has ``minimum`` of the peak, 0.1 by default.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
