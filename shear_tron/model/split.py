"""How the model meets tensor parallelism: the few places where it could be cut.

``Split`` itself is a model on one device, where nothing is. ``shear_tron.parallel.tensor.TensorParallel`` overrides it.
"""

from collections.abc import Callable

from torch import Tensor

from shear_tron.params import Row


class Split:
    """No tensor parallelism: every weight and every token is here."""

    rank = 0
    size = 1
    sequence = False
    all_reduce_max: Callable[[Tensor], Tensor] | None = None
    all_reduce_sum: Callable[[Tensor], Tensor] | None = None

    def weight(self, parameter: Tensor, row: Row) -> Tensor:
        """This rank's part of a weight as a plain tensor, its gradient accounted for."""
        return parameter

    def enter(self, x: Tensor) -> Tensor:
        """From this rank's tokens to all tokens: what a layer cut by heads or columns reads. [tokens, hidden]"""
        return x

    def leave(self, x: Tensor) -> Tensor:
        """From partial sums over the ranks' heads or columns to the sum, on this rank's tokens. [tokens, hidden]"""
        return x

    def part(self, mask: Tensor | None) -> Tensor | None:
        """This rank's part of a mask over heads or feed-forward columns."""
        return mask

    def shared(self, mask: Tensor | None) -> Tensor | None:
        """A mask every rank applies whole, such that the sum over ranks of its gradients is the gradient."""
        return mask
