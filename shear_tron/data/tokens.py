"""Reading tokens: the shards of a split as one long stream, read at any place."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shear_tron.data.manifest import Shard

OPEN_FILES = 128  # descriptors a stream keeps; a process may usually hold 1,024


class Stream:
    """The shards of one split, end to end.

    Read with ``pread`` and not through memory maps: pages of a map count as the process's own memory, and would grow
    with the data touched.
    """

    def __init__(self, folder: str, shards: Sequence[Shard], token_bytes: int):
        self._files = [os.path.join(folder, shard.file) for shard in shards]
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._lock = Lock()
        self.dtype = np.dtype(f"<u{token_bytes}")
        self.tokens = int(self._ends[-1]) if shards else 0

    def read_into(
        self, out: npt.NDArray[np.unsignedinteger], rows: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
    ) -> None:
        """Fill ``out[row]`` with the tokens from ``start`` on, for each row and start. ``out`` is [_, length]."""
        length = out.shape[1]
        shards = np.searchsorted(self._ends, starts, side="right")
        for row, start, shard in zip(rows.tolist(), starts.tolist(), shards.tolist(), strict=True):
            if start + length <= self._ends[shard]:
                self._read_shard(shard, start, out[row])
                continue
            filled = 0
            while filled < length:  # the window goes on in the next shard
                part = min(length - filled, int(self._ends[shard]) - start - filled)
                self._read_shard(shard, start + filled, out[row, filled : filled + part])
                filled, shard = filled + part, shard + 1

    def file_of(self, token: int) -> str:
        """The shard that holds token number ``token``."""
        return self._files[int(np.searchsorted(self._ends, token, side="right"))]

    def _read_shard(self, shard: int, start: int, out: npt.NDArray[np.unsignedinteger]) -> None:
        first = int(self._ends[shard - 1]) if shard else 0
        with self._lock:  # held while reading, so that no other thread closes the descriptor
            read = os.preadv(self._descriptor(shard), [out.data], (start - first) * self.dtype.itemsize)
        if read != out.nbytes:
            raise ValueError(
                f"shard {self._files[shard]} is shorter than its manifest says; run `shear-tron prepare` again"
            )

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self._files[shard], os.O_RDONLY)
        return self._open[shard]

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


def document_ends(inputs: Tensor, separator: int | None = None, bos: int | None = None) -> Tensor:
    """Where documents end in a batch of inputs, for attention that must not cross them.

    inputs: integers [batch, time] on any device. Returns int32 [documents + 1]: 0, then the end of each document in
    the flattened [batch * time] axis (``cu_seqlens``). A document ends after its ``separator``, or before the next
    ``bos`` when nothing separates; a row's end is an end too. Raises ValueError without either.
    """
    if separator is not None:
        last = inputs.eq(separator)
    elif bos is not None:
        last = inputs.eq(bos).roll(-1, dims=1)
    else:
        raise ValueError("documents have neither a separator nor a bos token; prepare the data with one of them")
    last[:, -1] = True
    ends = last.flatten().nonzero().flatten() + 1
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
