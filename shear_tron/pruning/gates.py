"""Hard-concrete gates: which units to keep, learned by gradient.

Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization" (arXiv 1712.01312), as used in
Sheared LLaMA (arXiv 2310.06694, section 2.1). Each prunable unit has one logit. A sample of its gate is a uniform
number pushed through a sigmoid around the logit, stretched past 0 and 1, and clamped back, so that a gate is often
*exactly* 0 or 1 and then passes no gradient. docs/masks.md says it in one page.
"""

from collections.abc import Mapping
from math import log

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from shear_tron.dims import KINDS
from shear_tron.masks import Masks
from shear_tron.pruning.counts import Counts, largest
from shear_tron.shape import Shape

STRETCH = (-0.1, 1.1)
TEMPERATURE = 2 / 3
LIMIT = log(100)  # logits stay within +-LIMIT: a gate is never more than 99.8 % or less than 4.7 % likely to be open
SHARPNESS = 0.8  # decided values are sigmoid(logit * SHARPNESS / TEMPERATURE), as in the released code
EDGE = 1e-6  # uniform noise stays this far from 0 and 1
WORD = 2**64

# A sample is 0 with the probability sigmoid(_SHIFT - logit).
_SHIFT = TEMPERATURE * log(-STRETCH[0] / STRETCH[1])


def copy_into(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Set ``parameters`` to ``state`` in place; ValueError on a missing, extra or misshapen tensor."""
    if parameters.keys() != state.keys():
        raise ValueError(f"state holds {sorted(state)}; expected exactly {sorted(parameters)}, the kinds being pruned")
    for kind, parameter in parameters.items():
        if state[kind].shape != parameter.shape:
            raise ValueError(f"{kind} has size {list(state[kind].shape)}; expected {list(parameter.shape)}")
    with torch.no_grad():
        for kind, parameter in parameters.items():
            parameter.copy_(state[kind])


def uniform(seed: int, step: int, microbatch: int, kind: str, size: tuple[int, ...]) -> Tensor:
    """Uniform noise in [EDGE, 1 - EDGE], float64, a pure function of its arguments.

    Philox turns a counter into random words; the clock (step, microbatch) *is* the upper half of the counter, so no
    two moments overlap and any one can be replayed alone. (torch's CPU generator uses only 32 bits of its seed.) Only
    raw words are drawn, whose stream numpy promises to keep.
    """
    for name, value in (("seed", seed), ("step", step), ("microbatch", microbatch)):
        if not 0 <= value < WORD:
            raise ValueError(f"{name}={value} is not a 64-bit count; use a whole number of 0 or more, below 2**64")
    key = np.array([seed, KINDS.index(kind)], dtype=np.uint64)
    counter = np.array([0, 0, microbatch, step], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(size)
    fraction = torch.from_numpy((words >> np.uint64(11)).astype(np.float64)) * 2.0**-53
    return EDGE + (1 - 2 * EDGE) * fraction


class Gates:
    """The logits of all units that may be pruned, and the three ways to look at them.

    Args:
        source, target: shapes before and after; a kind has logits only where the target is smaller.
        seed: of the sampling noise, 0 <= seed < 2**64.
        dtype: of the logits and masks.
        balance: blocks of a layer that keep equal counts, as for ``Counts``.

    ``logits`` maps a kind of ``masks.KINDS`` to a parameter of the size ``masks.sizes(source)`` gives it. They are the
    same on every rank, and live on the CPU: the masks decide the sizes of tensors, and reading them must not make the
    host wait for a GPU.
    """

    def __init__(
        self, source: Shape, target: Shape, seed: int = 0, dtype: torch.dtype = torch.float32, balance: int = 1
    ) -> None:
        self.units = Counts(source, target, balance)
        self.counts = self.units.kept
        self.seed = seed
        self.logits = {
            # The released code draws N(5, 0.01) and clamps it before its first use, so that all start at LIMIT.
            kind: torch.nn.Parameter(torch.full(size, LIMIT, dtype=dtype))
            for kind, size in self.units.sizes.items()
        }
        self.noise(0, 0)  # so that a bad seed is an error now

    def noise(self, step: int, microbatch: int) -> dict[str, Tensor]:
        """Uniform noise of all units for microbatch number ``microbatch`` of the *global* batch of step ``step``."""
        return {
            kind: uniform(self.seed, step, microbatch, kind, tuple(logits.shape))
            for kind, logits in self.logits.items()
        }

    def sample_from(self, noise: Mapping[str, Tensor]) -> Masks:
        """Masks made of uniform ``noise`` in (0, 1), one number a unit; differentiable in the logits."""
        return Masks(**{kind: hard_concrete(logits, noise[kind]) for kind, logits in self.logits.items()})

    def sample(self, step: int, microbatch: int) -> Masks:
        """Random masks, differentiable in the logits; the same on every rank and in every run that asks again."""
        return self.sample_from(self.noise(step, microbatch))

    def expected(self) -> Masks:
        """Each unit's probability of being open (not exactly 0), differentiable in the logits."""
        return Masks(**{kind: torch.sigmoid(logits - _SHIFT) for kind, logits in self.logits.items()})

    def decide(self) -> Masks:
        """Masks without noise that keep exactly the target's counts, in every layer (also in those that are dropped).

        A kept unit has a soft value, ``sigmoid(logit * SHARPNESS / TEMPERATURE)``, a pruned one exactly 0. Among equal
        logits the first are kept.
        """
        return Masks(
            **{
                kind: _soft(logits.detach(), self.units.largest(kind, logits.detach()))
                for kind, logits in self.logits.items()
            }
        )

    def decide_expected(self) -> Masks:
        """Like ``decide``, but keeps in each block as many units as are open on average now: the model as it stands."""
        masks = {}
        for kind, probabilities in self.expected().items():
            chances, logits = self.blocks(kind, probabilities.detach()), self.logits[kind].detach()
            total = chances.shape[-1]
            closed = total - chances.sum(-1).reshape(-1)
            counts = [total - round(zeros) for zeros in closed.tolist()]
            kept = largest(self.blocks(kind, logits).reshape(-1, total), counts).reshape(logits.shape)
            masks[kind] = _soft(logits, kept)
        return Masks(**masks)

    def blocks(self, kind: str, values: Tensor) -> Tensor:
        """``Counts.split``."""
        return self.units.split(kind, values)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the logits back into +-LIMIT; to be called after every optimizer step."""
        for logits in self.logits.values():
            logits.clamp_(-LIMIT, LIMIT)

    def state_dict(self) -> dict[str, Tensor]:
        """The logits as plain tensors, by kind. They share memory with the parameters."""
        return {kind: logits.detach() for kind, logits in self.logits.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the logits; ValueError unless kinds and sizes are exactly these."""
        copy_into(self.logits, state)


def hard_concrete(logits: Tensor, noise: Tensor) -> Tensor:
    """Sampled gates in [0, 1], of the size of ``logits``, from uniform ``noise`` in (0, 1). Differentiable."""
    low, high = STRETCH
    concrete = torch.sigmoid((torch.logit(noise.to(logits.dtype)) + logits) / TEMPERATURE)
    # hardtanh, not clamp: its slope is 0 also where the value is 0 without being clamped. A gate of 0 then always has
    # a gradient of 0, which makes leaving its unit out of the step exact.
    return hardtanh(low + (high - low) * concrete, 0.0, 1.0)


def _soft(logits: Tensor, kept: Tensor) -> Tensor:
    """Soft values of the kept units, else 0."""
    return torch.where(kept, torch.sigmoid(logits * (SHARPNESS / TEMPERATURE)), 0.0)
