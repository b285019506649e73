"""Scores of units that need no gradient: from the weights, or from chance. Pure functions, alike in any layout."""

from collections.abc import Callable

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import KINDS, sizes
from shear_tron.params import params
from shear_tron.pruning.gates import uniform

PIECE = 1 << 24  # entries of a weight that are in float64 at once, wherever one is read whole: 128 MB


def magnitude(read: Callable[[str], Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The sum of squares of the weights that each unit has a part in, float64, by kind.

    read: from a parameter's name to its whole tensor; only matrices are read, one at a time. A layer's score is that
    of all its matrices. Embedding and head count for hidden.
    """
    shape = architecture.shape
    scores = {kind: torch.zeros(size, dtype=torch.float64) for kind, size in sizes(shape).items()}
    for parameter in params(architecture):
        if len(parameter.size) == 1:
            continue
        sums = _squares(read(parameter.name).detach())
        for own_sums, dim in zip(sums, parameter.row.dims, strict=True):
            along = own_sums.view([int(getattr(shape, factor)) for factor in dim.factors])
            for place, kind in enumerate(dim.factors):
                if kind in scores:
                    own = scores[kind] if scores[kind].dim() == 1 else scores[kind][parameter.layer]
                    own += along.movedim(place, 0).reshape(len(own), -1).sum(1)
        if parameter.layer is not None:
            scores["layers"][parameter.layer] += sums[0].sum()
    return scores


def _squares(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix, the sums of squares of each row and of each column, float64, a few rows at a time."""
    squares = (rows.double().square() for rows in torch.split(weight, max(1, PIECE // weight.shape[1])))
    sums = [(each.sum(1), each.sum(0)) for each in squares]
    return torch.cat([rows for rows, _ in sums]), torch.stack([columns for _, columns in sums]).sum(0)


def chance(seed: int, architecture: Architecture) -> dict[str, Tensor]:
    """Uniform random scores, a function of ``seed`` (a 64-bit count), float64, by kind."""
    size_of = sizes(architecture.shape)
    return {kind: uniform(seed, 0, 0, kind, size_of[kind]) for kind in KINDS}
