"""Turn the residual stream to its principal axes, exactly: the same function, whose first dimensions matter most.

A norm without a weight is blind to rotation, so once every norm's weight is absorbed into what reads its output, any
orthogonal Q may be put between writers and readers of the stream: E <- E Q, W_o and W_down <- Q^T W, readers <- W Q.
With Q the eigenvectors of the normed streams' second moments, closing the last dimensions loses the least of them
(the idea of SliceGPT, arXiv 2401.15024). What comes out is an ordinary model, with untied embeddings.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import Dim
from shear_tron.params import by_leaf
from shear_tron.pruning.scores import PIECE

# The norm whose output each matrix reads. Other weights along hidden write to the stream.
READS = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "gate": "mlp_norm", "up": "mlp_norm", "lm_head": "norm"}


class Weights(Protocol):
    """A model's weights by our names: whole, or a part along an axis."""

    def read(self, name: str) -> Tensor: ...

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor: ...


def untied(architecture: Architecture) -> Architecture:
    """What a model is when it is turned: its embedding and its head absorb different things.

    ValueError where norms take off a mean, which turning would change.
    """
    if architecture.norm != "rms":
        raise ValueError(
            f"prune.rotate needs RMS norms; {architecture.family} has norm={architecture.norm}, which takes a mean off "
            "over hidden; leave it out"
        )
    return replace(architecture, shape=replace(architecture.shape, tied=False))


class Turned:
    """The weights of an untied model that computes what ``weights`` do, read when asked for: norms are absorbed.

    source: what ``weights`` are of. axes: float64 [hidden, hidden], orthogonal, the new axes as columns; None leaves
    the old ones. Computed in float64, returned in at least float32.
    """

    def __init__(self, weights: Weights, source: Architecture, axes: Tensor | None = None) -> None:
        self.weights, self.source, self.axes = weights, source, axes
        self.architecture = untied(source)

    def read(self, name: str) -> Tensor:
        return self._turned(name, self.weights.read(self._stored(name)))

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` along an axis that is not hidden."""
        return self._turned(name, self.weights.read_slice(self._stored(name), axis, start, stop))

    def _stored(self, name: str) -> str:
        return "embed" if name == "lm_head" and self.source.shape.tied else name

    def _turned(self, name: str, weight: Tensor) -> Tensor:
        prefix, _, leaf = name.rpartition(".")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if leaf in READS.values():
            return torch.ones_like(weight, dtype=dtype)
        norm = self.weights.read(f"{prefix}.{READS[leaf]}" if prefix else READS[leaf]) if leaf in READS else None
        dims = by_leaf(self.architecture)[leaf].dims
        axes = None if self.axes is None or Dim.HIDDEN not in dims else self.axes
        device = weight.device if axes is None else axes.device  # a GPU turns a 7B in seconds
        lies = weight.dim() > 1 and dims[0] is Dim.HIDDEN  # hidden is its rows, and any of its columns turns alone
        turned = torch.empty_like(weight, dtype=dtype)
        pieces = zip(*(_pieces(each, 1 if lies else 0) for each in (weight, turned)), strict=True)
        for piece, place in pieces:
            wide = piece.to(device).double()
            if norm is not None:
                wide *= norm.to(device)
            if axes is not None:
                wide = axes.T @ wide if lies else wide @ axes
            place.copy_(wide)
        return turned


def _pieces(weight: Tensor, axis: int) -> tuple[Tensor, ...]:
    """Views of ``weight`` cut along ``axis``, each small enough to have in float64 several times; whole if a vector."""
    if weight.dim() == 1:
        return (weight,)
    return torch.split(weight, max(1, PIECE * weight.shape[axis] // weight.numel()), axis)


def principal_axes(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(energy [hidden], axes [hidden, hidden]) of the second moments [hidden, hidden], the largest energy first."""
    values, vectors = torch.linalg.eigh(moments.double())
    return values.flip(0).clamp(min=0), vectors.flip(1)
