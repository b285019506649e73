"""Laws 4 and 11: any layout, compact or not, masks folded or where they act, gives what one process with masks gives.

Losses, weight gradients, mask gradients and the norm they are clipped by, in float64."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import shear_kernels
import torch
from ranks import run
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shear_tron.architecture import Architecture
from shear_tron.data.tokens import document_ends
from shear_tron.keep import Keep
from shear_tron.masks import Masks, sizes
from shear_tron.model.transformer import Transformer
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Context, Engine, broadcast_losses, build_stages
from shear_tron.parallel.tensor import keep_part
from shear_tron.parallel.topology import Layout, Topology, start
from shear_tron.shape import Shape

SHAPE = Shape(hidden=24, layers=4, heads=8, kv_heads=4, head_dim=6, ffn=20, vocab=40)
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
    "pp2": Layout(pp=2),
    "pp4": Layout(pp=4),
    "pp2 interleaved": Layout(pp=2, schedule="interleaved", stages_per_rank=2),
    "all on 8": Layout(pp=2, shard=2, tp=2),
    "all on 8, interleaved": Layout(pp=2, replicate=2, tp=2, sequence=False, schedule="interleaved", stages_per_rank=2),
}


KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "masked": {"masked": True, "folded": False},
    "compact": {"masked": True, "compact": 1},
    "compact, padded, documents": {"masked": True, "compact": 4, "documents": True, "folded": False},
}


@dataclass(frozen=True)
class Case:
    tied: bool
    masked: bool = False
    compact: int = 0  # with masks: leave closed units out, up to a multiple of this
    documents: bool = False  # several in a window
    folded: bool = True  # masks into the weights, as without kernels; else each where it acts, as with them

    @property
    def shape(self) -> Shape:
        return replace(SHAPE, tied=self.tied)

    @property
    def weights(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Transformer(Architecture(self.shape)).double()
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

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


def through_the_sampler(mask: Tensor) -> Tensor:
    """The gradient that reaches a mask's logits: none where the sampler's clamp closed the unit."""
    return torch.zeros_like(mask) if mask.grad is None else mask.grad * (mask != 0)


class InMemory:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def read(self, name: str) -> Tensor:
        return self.weights[name].clone()

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        return self.weights[name].narrow(axis, start, stop - start).clone()


def ends(tokens: Tensor) -> Tensor:
    return document_ends(tokens, separator=int(tokens[0, 2]))


Result = dict[str, Tensor]


def alone(case: Case) -> Result:
    """One process, no engine: the model, autograd, and arithmetic anyone can check."""
    model = Transformer(Architecture(case.shape)).double()
    model.load_state_dict(case.weights)
    tokens, labels = case.batch
    masks = [case.masks(number) for number in range(BATCH)]
    losses = []
    for i in range(BATCH):
        row = tokens[i : i + 1]
        documents = ends(row) if case.documents else None
        losses.append(model(row, labels[i : i + 1], masks[i], documents=documents))
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
    return keep_part(masks, case.shape, topology.tp_rank, topology.layout.tp, case.compact, topology.device)


def together(case: Case, layout: Layout) -> Result:
    """The engine on this rank."""
    with patch.object(shear_kernels, "fuses_masks", lambda x: not case.folded):
        return _together(case, layout)


def _together(case: Case, layout: Layout) -> Result:
    topology = start(layout, torch.device("cpu"))
    architecture = Architecture(case.shape)
    stages = build_stages(architecture, topology, "none")
    stages = [shard(stage, InMemory(case.weights), topology, torch.float64, torch.float64) for stage in stages]
    count = BATCH // MICRO_BATCH // layout.dp
    documents = ends if case.documents else None
    engine = Engine(stages, topology, count, MICRO_BATCH, TIME, torch.float64, documents)
    tokens, labels = (x.chunk(layout.dp)[topology.dp_rank] for x in case.batch)
    masks = [case.masks(topology.dp_rank * count + number) for number in range(count)]
    gated = [Context(under, keep(under, case, topology)) for under in masks]
    result: Result = {}
    evaluated = broadcast_losses(
        engine.evaluate(tokens, labels, Context()), tokens.new_empty(len(tokens), dtype=torch.float64), topology
    )
    losses = broadcast_losses(
        engine.train(tokens, labels, gated),
        torch.empty(len(tokens), dtype=torch.float64),
        topology,
    )
    again = broadcast_losses(engine.evaluate(tokens, labels, gated[0]), torch.empty_like(losses), topology)
    assert again.shape == evaluated.shape == losses.shape
    result["losses"] = losses
    result["dp_rank"] = torch.tensor(topology.dp_rank)
    sync.sum_tied(stages, topology)
    result["norm"] = sync.clip(stages, LIMIT, topology)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter.grad, DTensor), (name, type(parameter), type(parameter.grad))
            result[f"grad.{name}"] = parameter.grad.full_tensor()
    if case.masked:
        grads = []
        for kind in sizes(case.shape):
            grads.append(torch.stack([through_the_sampler(getattr(mask, kind)) for mask in masks if mask]).sum(0))
        sync.sum_parts_mean_data(grads, topology)
        result |= {f"mask.{kind}": grad for kind, grad in zip(sizes(case.shape), grads, strict=True)}
    return result


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_gives_what_one_process_gives(layout: Layout, kind: dict[str, Any], tied: bool) -> None:
    case = Case(tied=tied, **kind)
    expected = alone(case)
    seen = set()
    for result in run(layout.world, together, case, layout):
        rank = int(result.pop("dp_rank"))
        for name, value in result.items():
            wanted = expected[name].chunk(layout.dp)[rank] if name == "losses" else expected[name]
            torch.testing.assert_close(value, wanted, atol=1e-10, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
            seen.add(name)
    assert seen == expected.keys()
