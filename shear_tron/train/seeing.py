"""To see what a model computes on its way without a word of its own about it: through the ``Split`` it asks anyway."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shear_tron.model.transformer import Transformer
from shear_tron.params import Row

ENTER = "enter"  # what a layer, or the head, reads: a norm's output, all tokens
SEEN_WEIGHTS = ("o", "down")  # whose inputs are this rank's heads and feed-forward columns

See = Callable[[int | None, str, Tensor], None]  # (layer, ENTER or a weight's leaf, [tokens, ...])


@contextmanager
def seeing(stages: Sequence[Transformer], see: See) -> Iterator[None]:
    """Within, ``see`` is shown every norm's output and every input of ``o`` and ``down``, of all of a rank's layers."""
    modules: list[tuple[int | None, Any]] = [(None, stage) for stage in stages]
    modules += [(int(number), layer) for stage in stages for number, layer in stage.layers.items()]
    splits = [module.split for _, module in modules]
    try:
        for (number, module), split in zip(modules, splits, strict=True):
            module.split = _Seeing(split, number, see)
        yield
    finally:
        for (_, module), split in zip(modules, splits, strict=True):
            module.split = split


class _Seeing:
    """A ``Split`` that shows what goes through it."""

    def __init__(self, split: Any, layer: int | None, see: See) -> None:
        self._split, self._layer, self._see = split, layer, see

    def __getattr__(self, name: str) -> Any:
        return getattr(self._split, name)

    def enter(self, x: Tensor) -> Tensor:
        entered: Tensor = self._split.enter(x)
        self._see(self._layer, ENTER, entered)
        return entered

    def weight(self, parameter: Tensor, row: Row) -> Tensor:
        weight: Tensor = self._split.weight(parameter, row)
        if row.leaf not in SEEN_WEIGHTS:
            return weight
        shown = weight.as_subclass(_Shown)
        shown.see = lambda x: self._see(self._layer, row.leaf, x)
        return shown


class _Shown(Tensor):
    """A weight that shows what it is multiplied with, and is a plain tensor otherwise."""

    see: Callable[[Tensor], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args[1].see(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
