"""Scores of units that need no gradient: from the weights, or from chance. Pure functions, alike in any layout."""

from collections.abc import Callable

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import KINDS, sizes
from shear_tron.params import params
from shear_tron.pruning.gates import uniform


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
        square = read(parameter.name).detach().double().square()
        for axis, dim in enumerate(parameter.row.dims):
            along = square.sum(1 - axis).view([int(getattr(shape, factor)) for factor in dim.factors])
            for place, kind in enumerate(dim.factors):
                if kind in scores:
                    own = scores[kind] if scores[kind].dim() == 1 else scores[kind][parameter.layer]
                    own += along.movedim(place, 0).reshape(len(own), -1).sum(1)
        if parameter.layer is not None:
            scores["layers"][parameter.layer] += square.sum()
    return scores


def chance(seed: int, architecture: Architecture) -> dict[str, Tensor]:
    """Uniform random scores, a function of ``seed`` (a 64-bit count), float64, by kind."""
    size_of = sizes(architecture.shape)
    return {kind: uniform(seed, 0, 0, kind, size_of[kind]) for kind in KINDS}
