"""The making of masks within a training step: sample, take their gradients, step; in any layout."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.data.sampler import Batches
from shear_tron.keep import Keep
from shear_tron.masks import Masks
from shear_tron.model.context import Context
from shear_tron.parallel import sync
from shear_tron.parallel.agree import AgreedError
from shear_tron.parallel.pipeline import Engine
from shear_tron.parallel.tensor import keep_part
from shear_tron.parallel.topology import Topology
from shear_tron.pruning.config import PruneConfig
from shear_tron.pruning.make import make_method
from shear_tron.pruning.scored import Scored
from shear_tron.pruning.scores import chance, magnitude
from shear_tron.shape import Shape
from shear_tron.train.activations import activation_scores
from shear_tron.train.optimizer import finite_gradients, moments, start_moments
from shear_tron.transfer import sent

# Kept counts are padded up to a multiple of this: what matrix units like. On 2 CPU cores at hidden 1024, gates halfway,
# forward and backward took 8.2 s unpadded, 6.2 s at 16 and 6.5 s at 64 (gates closed: 2.6, 2.2 and 2.4 s).
PAD_TO = {"cuda": 64, "cpu": 16}
# Copying so large a share costs more than the rest saves: 3 % of a step with all gates open.
WHOLE = 15 / 16


class Pruner:
    """A method of making masks (``shear_tron.pruning``) and its optimizer if it learns, alike on every rank.

    Within a step the model sees detached masks of each microbatch, leaves. ``backward`` then hands the gradients they
    gathered to the method.
    """

    def __init__(
        self,
        source: Architecture,
        target: Shape,
        config: PruneConfig,
        seed: int,
        topology: Topology,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.topology, self.source, self.config, self.seed = topology, source, config, seed
        self.compact = config.compact
        self.pad_to = config.pad_to or PAD_TO[topology.device.type]
        self.method = make_method(config, source, target, seed, dtype)
        groups = self.method.parameter_groups(config.learning_rate)
        self.optimizer = torch.optim.AdamW(groups) if groups else None
        self.rate = config.learning_rate
        self.ranks = _Ranks(topology)

    def calibrate(self, engine: Engine, batches: Batches, microbatches: range) -> None:
        """Let the method see the batches that it wants before the first step; weights stay as they are. Collective."""
        if self.config.method == "activation":
            seen = batches.take(self.config.calibration_batches, self.topology.device)
            assert isinstance(self.method, Scored)
            self.method.set_scores(activation_scores(engine, seen, self.topology))
            return
        for step in range(-self.config.batches_before, 0):
            ((tokens, labels),) = batches.take(1, self.topology.device)
            drawn = self.sample(step, microbatches)
            engine.train(tokens, labels, drawn)
            self.backward(step, drawn)
            for stage in engine.stages:
                stage.zero_grad()
            if not self.is_finite():
                raise AgreedError("scores of units are not finite; the model or the data is damaged")
            self.step()

    def set_energy(self, energy: Tensor) -> None:
        """Of the principal axes that the hidden dimensions are now."""
        assert isinstance(self.method, Scored)
        self.method.set_energy(energy)

    def begin(self, read: Callable[[str], Tensor]) -> None:
        """Before the first step of a new run: set the scores that are not learned, and close the first units.

        read: from a parameter's name to its whole tensor in the source; one rank reads. Collective.
        """
        if not isinstance(self.method, Scored):
            return
        if self.config.method == "random":
            self.method.set_scores(chance(self.seed, self.source))
        elif self.config.method == "magnitude":
            scores = {
                kind: torch.zeros(scores.shape, dtype=torch.float64) for kind, scores in self.method.scores.items()
            }
            if self.topology.is_main:
                found = magnitude(read, self.source)
                scores = {kind: found[kind] for kind in scores}  # not of kinds that stay whole: other ranks sum these
            self.method.set_scores({kind: sync.sum_over_ranks(own, self.topology) for kind, own in scores.items()})
        self.method.close(0)

    def sample(self, step: int, microbatches: range) -> "Drawn":
        """Masks of microbatches of the global batch, drawn as the step comes to them."""
        cut = self._cuts_hidden()

        def draw(number: int) -> tuple[Masks, Context]:
            masks = self.method.sample(step, number)
            return masks, Context(self._leaves(masks), self._keep(masks, cut))

        return Drawn(map(draw, microbatches))

    def decided(self, final: bool) -> Context:
        """The masks of evaluations: those of the target's counts, or of the counts expected by now."""
        masks = self.method.decide() if final else self.method.decide_now()
        return Context(masks.map(lambda mask: mask.to(self.topology.device)), self._keep(masks, self._cuts_hidden()))

    def _leaves(self, masks: Masks) -> Masks:
        """A copy on the device, sent at once, whose masks are leaves."""
        given = dict(masks.items())
        if not given:
            return masks
        flat = sent(torch.cat([mask.detach().flatten() for mask in given.values()]), self.topology.device)
        parts = zip(given.items(), torch.split(flat, [mask.numel() for mask in given.values()]), strict=True)
        return Masks(**{kind: part.view(mask.shape).requires_grad_() for (kind, mask), part in parts})

    def _cuts_hidden(self) -> bool:
        """Whether the microbatches of a step leave hidden columns out: by the share expected to be open, alike on all
        ranks, since a layer so cut needs no weights in its backward and the ranks gather them together or not."""
        hidden = self.method.expected().hidden
        return hidden is not None and float(hidden.detach().mean()) < WHOLE

    def _keep(self, masks: Masks, cut_hidden: bool) -> Keep | None:
        topology = self.topology
        if not self.compact:
            return None
        where = topology.tp_rank, topology.layout.tp, self.pad_to, topology.device
        return keep_part(masks, self.source.shape, *where, WHOLE, cut_hidden)

    def backward(self, step: int, drawn: "Drawn") -> dict[str, Any]:
        """Hand the method what the leaves gathered in a step. Returns what it reports."""
        own = len(drawn.sampled)
        first, of = self.topology.dp_rank * own, self.topology.layout.dp * own
        return self.method.learn(step, range(first, first + own), of, drawn.sampled, drawn.gradients(), self.ranks)

    def step(self, rate_factor: float = 1.0) -> None:
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * rate_factor
            self.optimizer.step()
        self.method.advance()

    def is_finite(self) -> bool:
        """Whether what the method learned in this step may count."""
        return self.method.is_finite() and (self.optimizer is None or finite_gradients(self.optimizer))

    def tensors(self) -> dict[str, Tensor]:
        """Everything to checkpoint, by name; the tensors themselves."""
        found = self.method.tensors()
        return found if self.optimizer is None else found | moments(self.optimizer, self.method.parameters())

    def begin_at(self, step: int) -> None:
        if self.optimizer is not None:
            start_moments(self.optimizer, step)


class Drawn:
    """The masks of a step's microbatches, each drawn when its turn comes: on a GPU while the one before still runs.

    ``sampled``: those drawn so far, on the host and with a graph; ``gated``: what their microbatches run under, masks
    as leaves on the device.
    """

    def __init__(self, draws: Iterator[tuple[Masks, Context]]) -> None:
        self.sampled: list[Masks] = []
        self.gated: list[Context] = []
        self._draws = draws

    def __iter__(self) -> Iterator[Context]:
        """Draws the rest, one by one."""
        for masks, context in self._draws:
            self.sampled.append(masks)
            self.gated.append(context)
            yield context

    def gradients(self) -> list[dict[str, Tensor]]:
        """What the leaves gathered, by microbatch and kind, on the host; fetched at once."""
        found = [
            {kind: leaf.grad for kind, leaf in under.masks.items() if leaf.grad is not None} for under in self.gated
        ]
        flat = [grad.flatten() for by_kind in found for grad in by_kind.values()]
        if not flat:
            return [{} for _ in found]
        parts = iter(torch.split(torch.cat(flat).cpu(), [len(grad) for grad in flat]))
        return [{kind: next(parts).view(grad.shape) for kind, grad in by_kind.items()} for by_kind in found]


class _Ranks:
    """``shear_tron.pruning.method.Ranks`` of a layout."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def gradient(self, tensors: Sequence[Tensor]) -> None:
        sync.sum_parts_mean_data(tensors, self.topology)

    def whole(self, tensor: Tensor) -> Tensor:
        return sync.sum_over_parts(tensor.to(self.topology.device), self.topology).cpu()

    def mean(self, tensor: Tensor) -> Tensor:
        return sync.sum_over_data(tensor.to(self.topology.device), self.topology).cpu() / self.topology.layout.dp
