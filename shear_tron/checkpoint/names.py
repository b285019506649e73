"""What another format calls our parameters, as data: a name for each leaf, ``{}`` standing for the layer.

A fused tensor is ``Packed``. Whatever the format, a stored tensor is then some parameters side by side along axis 0,
in ``blocks`` that repeat: all of one after all of another is one block, a share of each for every head as many blocks
as there are heads, and a parameter on its own is the simplest case of both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.params import Param, params


@dataclass(frozen=True)
class Packed:
    """A tensor that holds several leaves.

    ``by="part"``: all rows of the first, then all of the next. ``by="head"``: for every key-value head its rows of the
    first (of ``q``: those of its group), then its rows of the next.
    """

    name: str
    leaves: tuple[str, ...]
    by: Literal["part", "head"]


Names = Mapping[str, str | Packed]


def with_biases(names: Names, weight: str = ".weight", bias: str = ".bias") -> Names:
    """``names``, and those of all biases: a weight's name with ``bias`` for its ending ``weight``, packed alike."""

    def of(name: str | Packed) -> str | Packed:
        if isinstance(name, Packed):
            return Packed(str(of(name.name)), tuple(f"{leaf}_bias" for leaf in name.leaves), name.by)
        return name.removesuffix(weight) + bias

    return {**names, **{f"{leaf}_bias": of(name) for leaf, name in names.items()}}


Read = Callable[[int, int, int], Tensor]  # (axis, start, stop): these entries of a stored tensor


@dataclass(frozen=True)
class Stored:
    """A tensor as another format stores it: ``params`` side by side along axis 0, in ``blocks`` that repeat."""

    name: str
    params: tuple[Param, ...]
    blocks: int = 1

    @property
    def size(self) -> tuple[int, ...]:
        return (sum(param.size[0] for param in self.params), *self.params[0].size[1:])

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The stored tensor of its parameters, given in the order of ``params``."""
        if len(tensors) == 1:
            return tensors[0]
        shares = [tensor.reshape(self.blocks, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(shares, 1).flatten(0, 1)

    def unpack(self, tensor: Tensor, param: Param) -> Tensor:
        """One parameter out of the stored tensor, or out of any part of it that has whole blocks of axis 0."""
        blocks = tensor.reshape(tensor.shape[0] // self._block, self._block, *tensor.shape[1:])
        return blocks.narrow(1, *self._place(param)).flatten(0, 1)

    def read(self, read: Read, param: Param) -> Tensor:
        """One whole parameter; of a tensor in one block nothing else is read."""
        return self.read_slice(read, param, 0, 0, param.size[0])

    def read_slice(self, read: Read, param: Param, axis: int, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` along ``axis`` of one parameter. Only the blocks they lie in are read."""
        offset, share = self._place(param)
        if axis != 0:
            return self.unpack(read(axis, start, stop), param)
        if self.blocks == 1:
            return read(0, offset + start, offset + stop)
        first, last = start // share, -(-stop // share)
        if first >= last:
            return read(0, 0, 0)
        return self.unpack(read(0, first * self._block, last * self._block), param).narrow(
            0, start - first * share, stop - start
        )

    @property
    def _block(self) -> int:
        return self.size[0] // self.blocks

    def _place(self, param: Param) -> tuple[int, int]:
        """Where the rows of ``param`` begin in a block, and how many they are."""
        shares = [each.size[0] // self.blocks for each in self.params]
        number = self.params.index(param)
        return sum(shares[:number]), shares[number]


def stored(architecture: Architecture, names: Names) -> Iterable[Stored]:
    """The tensors that a model of ``architecture`` is stored in, in the order of our parameters.

    Raises ValueError for a parameter that ``names`` has no place for, and for a packed tensor of which the model has
    only some leaves.
    """
    ours = {(param.row.leaf, param.layer): param for param in params(architecture)}
    for (leaf, layer), param in ours.items():
        name = names.get(leaf)
        if name is None:
            raise ValueError(f"{param.name} has no name in this format; use a model without it or another format")
        if isinstance(name, str):
            yield Stored(name.format(layer), (param,))
        elif leaf == name.leaves[0]:
            lacking = [each for each in name.leaves if (each, layer) not in ours]
            if lacking:
                raise ValueError(f"{name.name} holds {lacking[0]}, which this model lacks; use another format")
            parts = tuple(ours[each, layer] for each in name.leaves)
            blocks = architecture.shape.kv_heads if name.by == "head" else 1
            yield Stored(name.name.format(layer), parts, blocks)
        elif (name.leaves[0], layer) not in ours:
            raise ValueError(f"{name.name} holds {name.leaves[0]}, which this model lacks; use another format")
