"""How many units of each kind a target keeps, in a layer and in each block of one; and the largest of their scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shear_tron.dims import CUT_KINDS, KINDS, sizes
from shear_tron.shape import Shape, require_split


def pruned_kinds(source: Shape, target: Shape) -> dict[str, int]:
    """The kinds of structure of which ``target`` has fewer units than ``source``, and how many it has (a layer).

    Raises ValueError if ``target`` cannot be cut out of ``source``, or is as large.
    """
    source.require_target(target)
    before, after = sizes(source), sizes(target)
    kinds = {kind: after[kind][-1] for kind in KINDS if after[kind][-1] < before[kind][-1]}
    if not kinds:
        raise ValueError(f"target {target} is as large as the source; make at least one of its sizes smaller")
    return kinds


class Counts:
    """The counts of ``target``, by kind that is pruned.

    balance: the units of a layer that tensor parallelism cuts (key-value groups, ffn columns) lie in this many equal
    blocks, each of which keeps its share of the target: no tensor-parallel rank is left with more work than another,
    for any tp that divides it. ValueError where a size or the target's does not split.
    """

    def __init__(self, source: Shape, target: Shape, balance: int = 1) -> None:
        self.kept = pruned_kinds(source, target)  # units in a layer (hidden, layers: in the model)
        self.sizes = {kind: sizes(source)[kind] for kind in self.kept}  # of masks
        self.blocks = {kind: balance if kind in CUT_KINDS else 1 for kind in self.kept}
        for kind, parts in self.blocks.items():
            require_split(f"{kind} of the source", self.sizes[kind][-1], "balance", parts)
            require_split(f"{kind} of the target", self.kept[kind], "balance", parts)

    def split(self, kind: str, values: Tensor) -> Tensor:
        """Values of the units of ``kind``, [..., units], as [..., blocks, units of a block]."""
        return values.reshape(*values.shape[:-1], self.blocks[kind], -1)

    def largest(self, kind: str, values: Tensor, progress: float = 1.0) -> Tensor:
        """Where ``values`` [..., units] are among the largest of their block, bool; the first ones among equals.

        As many as the target keeps, or on the way there: a share ``progress`` of those to close is closed.
        """
        blocks = self.split(kind, values)
        size, target = blocks.shape[-1], self.kept[kind] // self.blocks[kind]
        count = size - round((size - target) * progress)
        rows = blocks.reshape(-1, size)
        return largest(rows, [count] * len(rows)).reshape(values.shape)


def largest(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Where ``rows`` [n, units] hold the ``counts[n]`` largest values of their row, bool."""
    # Ranks of a stable sort: exact counts, and among ties the same choice on every machine (topk leaves it open).
    ranks = rows.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < torch.tensor(counts).unsqueeze(-1)
