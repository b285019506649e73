"""Losses that jump, and going back from them: to the newest checkpoint, and on with the samples after."""

from collections.abc import Sequence

from shear_tron.parallel.agree import AgreedError

WINDOW, LEAST = 32, 8  # steps whose losses a loss is compared with; fewer than that tell nothing


class Spikes:
    """The rule: a loss is a spike if it is more than ``above`` nats over the mean of the last WINDOW steps' losses.

    Args:
        above: None: nothing is.
        limit: how often the run may go back to one checkpoint.
    """

    def __init__(self, above: float | None, limit: int) -> None:
        self.above, self.limit = above, limit
        self.losses: list[float] = []  # of the last steps that counted
        self._back = (-1, 0)  # to which step, how often

    def found(self, loss: float) -> bool:
        return (
            self.above is not None
            and len(self.losses) >= LEAST
            and loss > sum(self.losses) / len(self.losses) + self.above
        )

    def count(self, loss: float) -> None:
        """Remember a step's loss, which is no spike."""
        if self.above is not None:
            self.losses = [*self.losses, loss][-WINDOW:]

    def go_back(self, step: int, samples: Sequence[int]) -> None:
        """Count going back to ``step`` past ``samples``. AgreedError where it does not help."""
        to, times = self._back
        self._back = (step, times + 1 if to == step else 1)
        if self._back[1] > self.limit:
            raise AgreedError(
                f"the loss has jumped {self.limit + 1} times since step {step}, last within samples {samples[0]} to "
                f"{samples[-1]}; lower optimizer.learning_rate, raise train.rewind_above, or look at these samples"
            )

    def state(self) -> list[float]:
        """For a checkpoint: a run that goes on from it must find the same spikes."""
        return self.losses

    def restore(self, state: Sequence[float]) -> None:
        self.losses = list(state)
