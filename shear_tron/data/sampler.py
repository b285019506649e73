"""Which tokens make up sample number n: a pure function of the seed, n and the weights up to n.

No rank, worker or batch size takes part, so any layout draws the same samples and a resumed run goes on exactly.
The state is one number per domain.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from logging import INFO, WARNING, getLogger
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shear_tron.data import permutation
from shear_tron.data.manifest import Manifest, Shard
from shear_tron.data.permutation import Integers, permute
from shear_tron.data.tokens import Stream

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio

log = getLogger(__name__)


class Windows:
    """A split cut into windows of ``sequence + 1`` tokens, neighbours sharing one: the last label is the next input."""

    def __init__(self, manifest: Manifest, shards: Sequence[Shard], sequence: int):
        self.stream = Stream(manifest.folder, shards, manifest.token_bytes)
        self.sequence, self.vocab = sequence, manifest.vocab
        self.count = max(0, self.stream.tokens - 1) // sequence

    def read_into(self, out: npt.NDArray[np.unsignedinteger], rows: Integers, windows: Integers) -> None:
        """``out[row] = window`` for each pair. ``out`` is [_, sequence + 1].

        Raises ValueError for a token that is no id of the vocabulary: every rank would make something else of it.
        """
        starts = windows * self.sequence
        self.stream.read_into(out, rows, starts)
        largest = out[rows].max(axis=1)
        worst = int(largest.argmax())
        if largest[worst] >= self.vocab:
            file = self.stream.file_of(int(starts[worst]) + int(out[rows[worst]].argmax()))
            raise ValueError(
                f"shard {file} holds token {largest[worst]}, outside the vocabulary of {self.vocab} ids; it is "
                "damaged: delete it and run `shear-tron prepare` again"
            )


@dataclass(frozen=True)
class Draw:
    """What a run of samples consists of, each field [samples]: the domain's place in ``names``, the window in the
    domain, and how often the domain had been read through before."""

    domain: Integers
    window: Integers
    epoch: Integers


class Sampler:
    """A weighted mixture of the training windows of ``names``.

    Sample number n comes from the domain into whose share of [0, 1) falls the fractional part of
    ``offset(seed) + n / golden ratio``: every domain gets its weight's share of any stretch of samples to within a
    few (independent draws would stray by the square root), on every rank. Windows of a domain come without
    replacement, in an order fixed by (seed, domain, epoch).

    Raises ValueError for a domain that is unknown, empty, or shorter than one window.
    """

    def __init__(self, manifest: Manifest, names: Sequence[str], sequence: int, seed: int):
        self.names, self.sequence, self.seed = tuple(names), sequence, seed
        if not names or len(set(names)) < len(names):
            raise ValueError(f"domains={list(names)} must name at least one domain, and each only once")
        self._windows = [Windows(manifest, manifest.domain(name).train, sequence) for name in names]
        for name, windows in zip(names, self._windows, strict=True):
            if not windows.count:
                raise ValueError(
                    f"domain {name!r} has {windows.stream.tokens} training tokens, less than one window of "
                    f"sequence={sequence} plus 1; use a shorter sequence or prepare more of it"
                )
        self._dtype = self._windows[0].stream.dtype
        self._counts = np.array([windows.count for windows in self._windows])
        self._offset = int(permutation.keys(seed, "mixture")[0])
        self._number = 0
        self._drawn = np.zeros(len(names), dtype=np.int64)

    @property
    def number(self) -> int:
        """Samples drawn so far."""
        return self._number

    @property
    def epochs(self) -> dict[str, float]:
        """How often each domain has been read through so far; 1.5 is halfway through the second time."""
        return {
            name: drawn / w.count
            for name, drawn, w in zip(self.names, self._drawn.tolist(), self._windows, strict=True)
        }

    def draw(self, samples: int, weights: npt.ArrayLike) -> Draw:
        """The next ``samples`` samples under ``weights`` ([names], at least 0, any sum above 0)."""
        numbers = np.arange(self._number, self._number + samples, dtype=np.uint64)
        point = (np.uint64(self._offset) + numbers * np.uint64(GOLDEN) >> np.uint64(11)) * 2.0**-53
        domain = np.searchsorted(self._upper_ends(weights), point, side="right").astype(np.int64)
        counts = np.bincount(domain, minlength=len(self.names))
        place = np.empty(samples, np.int64)  # in the domain's own sequence
        place[np.argsort(domain, kind="stable")] = np.concatenate(
            [np.arange(drawn, drawn + count) for drawn, count in zip(self._drawn, counts, strict=True)]
        )
        epoch, position = np.divmod(place, self._counts[domain])
        orders, which = np.unique(np.stack([domain, epoch]), axis=1, return_inverse=True)
        keys = np.stack([_order(self.seed, self.names[of], turn) for of, turn in orders.T.tolist()], axis=1)
        window = permute(position, self._counts[domain], keys[:, which])
        self._drawn += counts
        self._number += samples
        return Draw(domain, window, epoch)

    def _upper_ends(self, weights: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Where each domain's share of [0, 1) ends. A share of nothing is never hit."""
        weights = np.asarray(weights, dtype=np.float64)
        if (
            weights.shape != (len(self.names),)
            or not np.isfinite(weights).all()
            or weights.min() < 0
            or not weights.any()
        ):
            raise ValueError(
                f"weights={weights.tolist()} must be one number >= 0 for each of {', '.join(self.names)}, not all 0"
            )
        ends = np.cumsum(weights / weights.sum())
        ends[np.flatnonzero(weights)[-1] :] = 1.0  # rounding must not leave a gap below 1
        return ends

    def read(self, draw: Draw, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens of samples [start, stop) of a draw: int64 [stop - start, sequence + 1]. Only these are read."""
        chosen = slice(start, stop)
        domain, window = draw.domain[chosen], draw.window[chosen]
        tokens = np.empty((domain.size, self.sequence + 1), dtype=self._dtype)
        for place in np.unique(domain).tolist():
            rows = np.flatnonzero(domain == place)
            self._windows[place].read_into(tokens, rows, window[rows])
        return torch.from_numpy(tokens.astype(np.int64))

    def state(self) -> dict[str, Any]:
        """Where the sampler stands, as plain numbers. The same for every rank and number of ranks."""
        return {
            "seed": self.seed,
            "sequence": self.sequence,
            "number": self._number,
            "drawn": dict(zip(self.names, self._drawn.tolist(), strict=True)),
            "windows": {name: windows.count for name, windows in zip(self.names, self._windows, strict=True)},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises ValueError when it belongs to other data, another sequence length or seed."""
        mine = self.state()
        for key in ("seed", "sequence", "windows"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the sampler's saved {key}={state[key]} is not this run's {mine[key]}; resume with the same seed, "
                    "sequence and prepared data"
                )
        self._number = int(state["number"])
        self._drawn = np.array([state["drawn"][name] for name in self.names], dtype=np.int64)


@lru_cache(maxsize=1024)
def _order(seed: int, name: str, epoch: int) -> npt.NDArray[np.uint64]:
    return permutation.keys(seed, name, epoch)


class Batch(NamedTuple):
    """tokens: int64 [rows, sequence + 1]; of each row, int64 [rows]: the domain's place in ``names``, and the window in
    the domain."""

    tokens: Tensor
    domains: Tensor
    windows: Tensor


class Batches:
    """Rows [start, stop) of one global batch of ``samples`` after another, read ahead in a thread.

    The sampler must not be used by anybody else until ``close``. Tokens are in pinned memory when CUDA is there.
    """

    def __init__(self, sampler: Sampler, samples: int, start: int, stop: int, weights: npt.ArrayLike, ahead: int = 2):
        self._sampler, self._samples, self._rows, self._ahead = sampler, samples, (start, stop), ahead
        self._weights = np.array(weights, dtype=np.float64)
        self._state = sampler.state()
        self._epochs: dict[str, int] = {name: int(epoch) for name, epoch in sampler.epochs.items()}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: list[tuple[dict[str, Any], Draw, Future[Tensor]]] = []
        self._fill()

    def _fill(self) -> None:
        while len(self._pending) < self._ahead:
            draw = self._sampler.draw(self._samples, self._weights)
            self._pending.append((self._sampler.state(), draw, self._pool.submit(self._read, draw)))

    def _read(self, draw: Draw) -> Tensor:
        tokens = self._sampler.read(draw, *self._rows)
        return tokens.pin_memory() if torch.cuda.is_available() else tokens

    def next(self) -> Batch:
        """The next batch."""
        state, draw, tokens = self._pending.pop(0)
        self._fill()
        result = tokens.result()
        self._state = state
        for place, name in enumerate(self._sampler.names):
            latest = int(draw.epoch[draw.domain == place].max(initial=0))
            if latest > self._epochs[name]:
                self._epochs[name] = latest
                level = WARNING if latest == 1 else INFO
                log.log(level, "domain %s has been read through %d times; it goes on reshuffled", name, latest)
        domains, windows = (torch.from_numpy(each[slice(*self._rows)].copy()) for each in (draw.domain, draw.window))
        return Batch(result, domains, windows)

    def take(self, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Inputs and labels of the next ``count`` batches, each int64 [stop - start, sequence], on ``device``."""
        windows = [self.next().tokens.to(device) for _ in range(count)]
        return [(each[:, :-1], each[:, 1:]) for each in windows]

    def set_weights(self, weights: npt.ArrayLike) -> None:
        """Weights from the very next batch on: what was read ahead under the old ones is drawn anew."""
        if np.array_equal(self._weights, np.asarray(weights, dtype=np.float64)):
            return
        self._drop()
        self._weights = np.array(weights, dtype=np.float64)
        self._fill()

    def state(self) -> dict[str, Any]:
        """The sampler's state after the batches that ``next`` has given out."""
        return self._state

    def _drop(self) -> None:
        for _, _, tokens in self._pending:
            tokens.cancel()
        self._pending.clear()
        self._sampler.restore(self._state)

    def close(self) -> None:
        """Stop reading, and leave the sampler where the consumed batches left it."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._drop()


def held_out(manifest: Manifest, name: str, sequence: int, windows: int) -> Tensor:
    """The first ``windows`` held-out windows of a domain, or all if there are fewer: int64 [_, sequence + 1].

    They come in one fixed random order, so that a few stand for the whole. Raises ValueError when there is none.
    """
    split = Windows(manifest, manifest.domain(name).held_out, sequence)
    if not split.count:
        raise ValueError(
            f"domain {name!r} has {split.stream.tokens} held-out tokens, less than one window of sequence={sequence} "
            "plus 1; prepare it with a larger held_out share or use a shorter sequence"
        )
    count = min(windows, split.count)
    tokens = np.empty((count, sequence + 1), dtype=split.stream.dtype)
    split.read_into(
        tokens, np.arange(count), permute(np.arange(count), split.count, permutation.keys("held out", name))
    )
    return torch.from_numpy(tokens.astype(np.int64))
