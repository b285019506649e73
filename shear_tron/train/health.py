"""Whether the numbers of a run are still numbers."""

from collections.abc import Callable
from math import isfinite
from typing import Any

from shear_tron.parallel.agree import AgreedError
from shear_tron.train.evaluation import DomainLosses, not_finite


class Health:
    """Counts the steps that had to be skipped, and stops a run that does nothing else.

    Args:
        limit: steps skipped in a row after which the run stops.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.skipped_in_a_row = 0

    def problem(self, losses: DomainLosses, norm: float, masks: bool) -> str | None:
        """What is not finite in this step on this rank, or None.

        losses, norm: of the step's batch, and of its gradient; masks: whether what was learned about masks is finite.
        """
        if not isfinite(losses.mean()):
            return f"loss is {losses.mean()} in {', '.join(not_finite(losses.by_domain()))}"
        if not isfinite(norm) or norm == 0.0:  # exactly 0 where activations overflow and a norm divides them away
            return f"the gradient norm is {norm}"
        if not masks:
            return "gradients of gates or multipliers are not finite"
        return None

    def count(self, skip: bool) -> None:
        """Count a step that all ranks skip, or none does."""
        self.skipped += skip
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0

    def require(self, line: dict[str, Any], last_good: Callable[[], str]) -> None:
        """Stop where too many steps in a row changed nothing, or a held-out loss in a step's log line is no number.

        Raises AgreedError: losses are alike on all ranks.
        """
        if self.skipped_in_a_row >= self.limit:
            raise AgreedError(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last one because {line['skipped']}; "
                f"lower optimizer.learning_rate, or look at these samples. {last_good()}"
            )
        broken = not_finite(line.get("held_out", {}))
        if broken:
            raise AgreedError(
                f"the held-out loss of {', '.join(broken)} is {line['held_out'][broken[0]]} after step {line['step']}; "
                f"lower optimizer.learning_rate, or look at that domain. {last_good()}"
            )

    def state(self) -> dict[str, int]:
        """Plain numbers, for a checkpoint."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
