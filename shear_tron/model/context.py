"""What one microbatch runs under."""

from dataclasses import dataclass

from torch import Tensor

from shear_tron.keep import Keep
from shear_tron.masks import NO_MASKS, Masks


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher makes of a microbatch. states: [tokens, hidden], its final norm's output for all tokens; head:
    [vocab (this rank's part), hidden], hidden being the teacher's."""

    states: Tensor
    head: Tensor


@dataclass(frozen=True)
class TeacherSamples:
    """Of a teacher's distribution over the next token, a few words that stand for all (docs/distillation.md).

    ids: int64 [tokens, samples]; shares: their estimated probabilities, alike; information: [tokens], the sum of
    p log p.
    """

    ids: Tensor
    shares: Tensor
    information: Tensor


@dataclass(frozen=True)
class Context:
    """Masks (None: a dense model); to leave closed units out, which to keep; where documents end.

    keep: the units whose masks are not zero (and perhaps some more), of this tensor-parallel rank: with it a model runs
    on those alone, which gives the same numbers (docs/compaction.md). documents: see ``attention.Positions``.
    teacher: for a readout that learns from one, on the last stage.
    """

    masks: Masks = NO_MASKS
    keep: Keep | None = None
    documents: Tensor | None = None
    teacher: TeacherStates | TeacherSamples | None = None


DENSE = Context()
