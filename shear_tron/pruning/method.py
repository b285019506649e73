"""How masks are made is a choice behind one face: what a training step asks of whatever chooses the units.

Every number here is the same on every rank and lives on the CPU: masks decide the sizes of compact tensors, and
reading them must not make the host wait for a GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from shear_tron.masks import Masks


class Ranks(Protocol):
    """Sums over ranks, of tensors alike on all: where a rank saw a part, the sum of the parts; over data, the mean."""

    def gradient(self, tensors: Sequence[Tensor]) -> None:
        """In place, from each rank's share to the gradient: the sum over parts and the mean over data."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that saw parts of the same data."""
        ...

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks that saw other data."""
        ...


class Method(ABC):
    """A way of making masks for a run's every microbatch, ending at exactly the target's counts."""

    @abstractmethod
    def sample(self, step: int, microbatch: int) -> Masks:
        """Masks for microbatch ``microbatch`` of the *global* batch of ``step``, a function of these and state."""

    @abstractmethod
    def learn(
        self, step: int, microbatches: range, of: int, sampled: Sequence[Masks],
        gradients: Sequence[Mapping[str, Tensor]], ranks: Ranks,
    ) -> dict[str, Any]:  # fmt: skip
        """Take what a step's gradients say; ``advance`` makes it count, or does not where a step is skipped.

        microbatches: this rank's share of the global batch's ``of``. gradients: by kind, of the mean loss of that share
        with respect to each of the ``sampled`` masks; a kind is absent where a rank saw none of it. Returns what to
        log, among it ``expected_KIND_sparsity`` and ``target_KIND_sparsity`` by kind, ``expected_sparsity`` and
        ``target_sparsity``.
        """

    @abstractmethod
    def advance(self) -> None:
        """End the step that ``learn`` saw. A method with ``parameter_groups`` has had its optimizer's step before."""

    @abstractmethod
    def decide(self) -> Masks:
        """Masks that keep exactly the target's counts, in every layer."""

    @abstractmethod
    def decide_now(self) -> Masks:
        """Masks of the model as it stands, for evaluations on the way."""

    @abstractmethod
    def expected(self) -> Masks:
        """Each unit's probability of being open now."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The whole state, by the name it has in a checkpoint; the tensors themselves."""

    def parameters(self) -> dict[str, Tensor]:
        """Those of ``tensors`` that an optimizer moves, by the same names."""
        return {}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """``parameters`` as AdamW wants them, each with its gradient after ``learn``."""
        return []

    def is_finite(self) -> bool:
        """Whether what ``learn`` found may count."""
        return True
