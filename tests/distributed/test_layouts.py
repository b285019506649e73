"""Laws 4 and 11: any layout, compact or not, masks folded or where they act, gives what one process with masks gives.

Losses, weight gradients, mask gradients and the norm they are clipped by, in float64."""

from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any
from unittest.mock import patch

import pytest
import shear_kernels
import torch
from models import ARCHITECTURES, InMemory, random_model, weights_of
from ranks import run
from torch import Tensor
from torch.distributed.tensor import DTensor

from shear_tron.architecture import Architecture
from shear_tron.data.tokens import document_ends
from shear_tron.dims import sizes
from shear_tron.keep import Keep
from shear_tron.masks import Masks
from shear_tron.model.context import DENSE, Context
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.tensor import keep_part
from shear_tron.parallel.topology import Layout, Topology, start
from shear_tron.shape import Shape

BATCH, MICRO_BATCH, TIME = 8, 1, 6
LIMIT = 0.1  # clips

LAYOUTS = {
    "dp2": Layout(replicate=2),
    "fsdp2": Layout(shard=2),
    "one": Layout(),
    "hybrid2x2": Layout(replicate=2, shard=2),
    "tp2": Layout(tp=2, sequence=False),
    "tp4": Layout(tp=4, sequence=False),
    "tp2+sp": Layout(tp=2),
    "pp3": Layout(pp=3),  # four layers: 1, 1 and 2, or where the head weighs a layer 1, 2 and 1
    "pp4": Layout(pp=4),
    "pp2 interleaved": Layout(pp=2, schedule="interleaved", stages_per_rank=2),
    "all on 8": Layout(pp=2, shard=2, tp=2),
    "all on 8, interleaved": Layout(pp=2, replicate=2, tp=2, sequence=False, schedule="interleaved", stages_per_rank=2),
}


KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "masked": {"masked": True},
    "compact": {"masked": True, "compact": 1},
    "compact, padded, documents": {"masked": True, "compact": 4, "documents": True},
}


@dataclass(frozen=True)
class Case:
    model: str  # of ARCHITECTURES
    masked: bool = False
    compact: int = 0  # with masks: leave closed units out, up to a multiple of this
    documents: bool = False  # several in a window

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model]

    @property
    def shape(self) -> Shape:
        return self.architecture.shape

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        windows = torch.randint(self.shape.vocab, (BATCH, TIME + 1), generator=generator)
        return windows[:, :-1], windows[:, 1:]

    def masks(self, microbatch: int) -> Masks | None:
        """Fresh for every microbatch; a third of the units closed, the others soft."""
        if not self.masked:
            return None
        generator = torch.Generator().manual_seed(100 + microbatch)
        values = {}
        for kind, size in sizes(self.shape).items():
            value = torch.rand(size, generator=generator, dtype=torch.float64)
            value[torch.rand(size, generator=generator) < 0.3] = 0
            values[kind] = value.requires_grad_()
        values["hidden"].data[0] = values["layers"].data[0] = 1
        return Masks(**values)


CASES = {f"{model}: {kind}": Case(model, **how) for model in ARCHITECTURES for kind, how in KINDS.items()}


def through_the_sampler(mask: Tensor) -> Tensor:
    """The gradient that reaches a mask's logits: none where the sampler's clamp closed the unit."""
    return torch.zeros_like(mask) if mask.grad is None else mask.grad * (mask != 0)


def ends(tokens: Tensor) -> Tensor:
    return document_ends(tokens, separator=int(tokens[0, 2]))


Result = dict[str, Tensor]


@cache
def alone(case: Case) -> Result:
    """One process, no engine: the model, autograd, and arithmetic anyone can check."""
    model = random_model(case.architecture)
    tokens, labels = case.batch
    masks = [case.masks(number) for number in range(BATCH)]
    losses = []
    for i in range(BATCH):
        row = tokens[i : i + 1]
        documents = ends(row) if case.documents else None
        losses.append(model(row, labels[i : i + 1], Context(masks[i] or Masks(), documents=documents))[0])
    losses = torch.cat(losses)
    losses.mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    result = {f"grad.{name}": grad * min(1, LIMIT / (norm + 1e-6)) for name, grad in grads.items()}
    result |= {"losses": losses.detach(), "norm": norm}
    if case.masked:
        for kind in sizes(case.shape):
            result[f"mask.{kind}"] = sum(through_the_sampler(getattr(mask, kind)) for mask in masks if mask)
    return result


def keep(masks: Masks | None, case: Case, topology: Topology) -> Keep | None:
    if masks is None or not case.compact:
        return None
    cut = True if case.compact == 1 else None  # and gather no weights for backward
    where = topology.tp_rank, topology.layout.tp
    return keep_part(masks, case.shape, *where, case.compact, topology.device, cut_hidden=cut)


def together(layout: Layout) -> dict[str, Result]:
    """The engine on this rank, through every case, by its name. One engine serves all cases of an architecture."""
    topology = start(layout, torch.device("cpu"))
    results = {}
    for model, architecture in ARCHITECTURES.items():
        stages = build_stages(architecture, topology, "none")
        weights = InMemory(weights_of(random_model(architecture)))
        stages = [shard(stage, weights, topology, torch.float64, torch.float64) for stage in stages]
        count = BATCH // MICRO_BATCH // layout.dp
        engine = Engine(stages, topology, count, MICRO_BATCH, TIME, torch.float64)
        for kind in KINDS:
            # In turn, layer by layer: masks where they act, head gates alone folded into weights, all of them folded.
            fused, gates = cycle((True, True, False)), cycle((True, False))
            with (
                patch.object(shear_kernels, "fuses_masks", lambda x, ways=fused: next(ways)),
                patch.object(shear_kernels, "fuses_head_gates", lambda x, head_dim, edges, ways=gates: next(ways)),
            ):
                results[f"{model}: {kind}"] = _together(CASES[f"{model}: {kind}"], engine)
    return results


def _together(case: Case, engine: Engine) -> Result:
    topology, stages = engine.topology, engine.stages
    dp, dp_rank = topology.layout.dp, topology.dp_rank
    engine.documents = ends if case.documents else None
    tokens, labels = (x.chunk(dp)[dp_rank] for x in case.batch)
    masks = [case.masks(dp_rank * engine.count + number) for number in range(engine.count)]
    contexts = [Context(under or Masks(), keep(under, case, topology)) for under in masks]
    result: Result = {"dp_rank": torch.tensor(dp_rank)}
    if not case.masked:  # before the first step of all
        result["evaluated"] = engine.broadcast(engine.evaluate(tokens, labels, DENSE), len(tokens))[0]
    result["losses"] = engine.broadcast(engine.train(tokens, labels, contexts), len(tokens))[0]
    sync.sum_tied(stages, topology)
    result["norm"] = sync.clip(stages, LIMIT, topology)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter.grad, DTensor), (name, type(parameter), type(parameter.grad))
            result[f"grad.{name}"] = parameter.grad.full_tensor()
            parameter.grad = None
    if case.masked:
        grads = []
        for kind in sizes(case.shape):
            grads.append(torch.stack([through_the_sampler(getattr(mask, kind)) for mask in masks if mask]).sum(0))
        sync.sum_parts_mean_data(grads, topology)
        result |= {f"mask.{kind}": grad for kind, grad in zip(sizes(case.shape), grads, strict=True)}
    else:  # after a step
        result["evaluated again"] = engine.broadcast(engine.evaluate(tokens, labels, DENSE), len(tokens))[0]
    return result


@cache
def ranks_of(name: str) -> list[dict[str, Result]]:
    """What every rank of a layout found: all cases in one set of processes."""
    return run(LAYOUTS[name].world, together, LAYOUTS[name])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_what_one_process_gives(name: str, case: str) -> None:
    layout, expected = LAYOUTS[name], alone(CASES[case])
    seen = set()
    for results in ranks_of(name):
        result = dict(results[case])
        rank = int(result.pop("dp_rank"))
        for key, value in result.items():
            by_rank = key in ("losses", "evaluated", "evaluated again")
            wanted = expected["losses"].chunk(layout.dp)[rank] if by_rank else expected[key]
            torch.testing.assert_close(value, wanted, atol=1e-10, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
            seen.add(key)
    assert seen - {"evaluated", "evaluated again"} == expected.keys()
