"""Losses by domain, over all ranks: of training batches, and of the held-out windows of every domain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from shear_tron.data.config import DataConfig
from shear_tron.data.manifest import Manifest
from shear_tron.data.sampler import held_out
from shear_tron.model.context import DENSE, Context
from shear_tron.parallel import sync
from shear_tron.parallel.agree import AgreedError
from shear_tron.parallel.pipeline import Engine
from shear_tron.parallel.topology import Topology


@dataclass(frozen=True)
class DomainLosses:
    """Losses summed by domain over all data-parallel ranks, alike on every rank. nats per token."""

    names: tuple[str, ...]
    sums: Tensor  # float64 [names], of the mean loss of each sequence
    counts: Tensor  # float64 [names], sequences

    @staticmethod
    def of(losses: Tensor, domains: Tensor, names: Sequence[str], topology: Topology) -> "DomainLosses":
        """losses: [batch], this rank's, of each sequence; domains: int64 [batch], places in ``names``, on the CPU."""
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        sums[0].index_add_(0, domains, losses.double().cpu())
        sums[1].index_add_(0, domains, torch.ones_like(domains, dtype=torch.float64))
        sums = sync.sum_over_data(sums.to(topology.device), topology).cpu()
        return DomainLosses(tuple(names), sums[0], sums[1])

    def mean(self) -> float:
        """Of all sequences; not finite if any one is not."""
        return float(self.sums.sum() / self.counts.sum())

    def by_domain(self) -> dict[str, float]:
        """Mean loss of each domain that had sequences. A domain without any is left out; one with a loss that is not
        finite stays, with that loss: the two must never look alike."""
        means = zip(self.names, (self.sums / self.counts).tolist(), self.counts.tolist(), strict=True)
        return {name: mean for name, mean, count in means if count}


def not_finite(losses: dict[str, float]) -> list[str]:
    """The domains whose loss is NaN or infinite."""
    return [name for name, loss in losses.items() if not isfinite(loss)]


class HeldOut:
    """The held-out windows of all domains, and a model's loss on them.

    Args:
        share: windows that a data-parallel rank takes at a time: as many as of a training batch.
    """

    def __init__(
        self,
        manifest: Manifest,
        names: Sequence[str],
        data: DataConfig,
        engine: Engine,
        topology: Topology,
        share: int,
    ) -> None:
        self.names, self.engine, self.topology, self.share = tuple(names), engine, topology, share
        windows = [held_out(manifest, name, data.sequence, data.evaluate_windows) for name in names]
        self.windows = torch.cat(windows)  # int64 [_, sequence + 1]
        self.domains = torch.cat([torch.full((len(w),), place) for place, w in enumerate(windows)])

    def __len__(self) -> int:
        """Windows."""
        return len(self.windows)

    def losses(self, context: Context, done: Callable[[int], object] = lambda _: None) -> dict[str, float]:
        """Held-out loss of each domain, nats per token, the same on all ranks. NaN where the model's loss is.

        done: told how many windows are done each time some are.
        """
        layout, dp_rank, total = self.topology.layout, self.topology.dp_rank, len(self.windows)
        losses, places = [], []
        for first in range(0, total, self.share * layout.dp):
            rows = torch.arange(first + dp_rank * self.share, first + (dp_rank + 1) * self.share)
            found = self.engine.evaluate(*self.rows(rows), context)
            losses.append(self.engine.broadcast(found, self.share)[0])  # the next-token loss
            places.append(rows)
            done(min(self.share * layout.dp, total - first))
        rows, found = torch.cat(places), torch.cat(losses)
        real = rows < total
        return DomainLosses.of(
            found[real.to(found.device)], self.domains[rows[real]], self.names, self.topology
        ).by_domain()

    def losses_of_source(self, model: str, done: Callable[[int], object]) -> dict[str, float]:
        """The losses of the dense model before any step. AgreedError where one is no number."""
        losses = self.losses(DENSE, done)
        if broken := not_finite(losses):
            raise AgreedError(
                f"the loss of {model} on {', '.join(broken)} is {losses[broken[0]]}; the model or the data is damaged"
            )
        return losses

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and labels of windows, which begin again after the last: batches are always full."""
        windows = self.windows[rows % len(self.windows)].to(self.topology.device)
        return windows[:, :-1], windows[:, 1:]
