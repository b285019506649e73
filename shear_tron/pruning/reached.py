"""Whether masks came to where they were to go, before the target's counts are cut out by force.

``Method.decide`` keeps exactly the target's counts, whatever the gates say. Where they still say something else, it
cuts units that are open or keeps closed ones, and the model breaks. So the share of units expected to be closed is
compared with the target's.
"""

from shear_tron.masks import Masks
from shear_tron.pruning.counts import pruned_kinds
from shear_tron.shape import Shape

# Of the units of a kind, as a share. The constraint is soft and swings about the target by one or two hundredths; at
# five, every twentieth unit is decided against its gate.
TOLERANCE = 0.05


def missed(expected: Masks, source: Shape, target: Shape) -> dict[str, tuple[float, float]]:
    """(share of units expected to be closed, target's share) of each kind that is further from it than TOLERANCE.

    expected: each unit's probability of being open, as ``Method.expected`` gives it.
    """
    found = {}
    for kind, count in pruned_kinds(source, target).items():
        probabilities = dict(expected.items())[kind]
        closed, wanted = 1 - probabilities.mean().item(), 1 - count / probabilities.shape[-1]
        if abs(closed - wanted) > TOLERANCE:
            found[kind] = (closed, wanted)
    return found


def told(missed: dict[str, tuple[float, float]]) -> str:
    """A sentence about it, without an end."""
    kinds = ", ".join(f"{kind} {closed:.2f} of {wanted:.2f}" for kind, (closed, wanted) in missed.items())
    cut = ["cut that are open"] if any(closed < wanted for closed, wanted in missed.values()) else []
    kept = ["kept that are closed"] if any(closed > wanted for closed, wanted in missed.values()) else []
    return f"the masks missed the target (closed: {kinds}), so units were {' and others '.join(cut + kept)}"
