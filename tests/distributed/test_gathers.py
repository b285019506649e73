"""A compact step gathers each layer's weights once, not again for its backward, to the same bits."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import ARCHITECTURES, InMemory, random_model, weights_of
from ranks import run
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, start
from shear_tron.pruning.config import PruneConfig, TargetConfig
from shear_tron.pruning.gates import LIMIT, Gates
from shear_tron.train.pruner import Pruner

TARGET = TargetConfig(hidden=12, layers=2, heads=4, kv_heads=2, ffn=8)
MICROBATCHES, TIME, LAYERS = 2, 6, 3
# Embedding and head once and each layer once forward; then each layer again.
ONCE, TWICE = MICROBATCHES * (1 + LAYERS), MICROBATCHES * (1 + 2 * LAYERS)
MODELS = ("llama, grouped", "qwen3", "gpt_neox")  # biases and norms of heads have no hidden columns to be cut by


def steps(model: str) -> dict[str, dict[str, Tensor]]:
    """Losses, gradients and gathers of a compact step: as it is, gathering for backward too, and checkpointed."""
    architecture = ARCHITECTURES[model]
    architecture = replace(architecture, shape=replace(architecture.shape, layers=LAYERS))
    topology = start(Layout(shard=2), torch.device("cpu"))
    target = TARGET.model_copy(update={"heads": architecture.shape.heads // 2})
    prune = PruneConfig(target=target, warmup_steps=1)
    pruner = Pruner(architecture, target.shape(architecture.shape), prune, 0, topology)
    gates: Gates = pruner.method.gates  # type: ignore[attr-defined]
    for kind, logits in gates.logits.items():
        shut = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) < (0.4 if kind != "layers" else 0)
        logits.data = torch.where(shut, -LIMIT, 1.0)
    found = {}
    for name, checkpointing, again in (("once", "none", False), ("twice", "none", True), ("full", "full", False)):
        stages = build_stages(architecture, topology, checkpointing)
        weights = InMemory(weights_of(random_model(architecture)))
        stages = [shard(stage, weights, topology, torch.float32, torch.float32) for stage in stages]
        engine = Engine(stages, topology, MICROBATCHES, 1, TIME, torch.float32)
        engine.recomputes |= again
        first = topology.dp_rank * MICROBATCHES
        tokens = torch.randint(40, (MICROBATCHES, TIME + 1), generator=torch.Generator().manual_seed(first))
        drawn = pruner.sample(4, range(first, first + MICROBATCHES))
        with patch.object(fsdp, "foreach_all_gather", wraps=fsdp.foreach_all_gather) as gathers:
            losses = engine.train(tokens[:, :-1], tokens[:, 1:], drawn)
        assert losses is not None
        result: dict[str, Any] = {"losses": losses, "gathers": torch.tensor(gathers.call_count)}
        for parameter, tensor in stages[0].named_parameters():
            result[parameter] = tensor.grad.full_tensor()  # type: ignore[union-attr]
        result |= {f"{n} {k}": g for n, by_kind in enumerate(drawn.gradients()) for k, g in by_kind.items()}
        result["left out"] = torch.tensor([LAYERS - len(under.keep.layers) for under in drawn.gated if under.keep])
        found[name] = result
    return found


def every() -> dict[str, dict[str, dict[str, Tensor]]]:
    return {model: steps(model) for model in MODELS}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, dict[str, Tensor]]]]:
    return run(2, every)


@pytest.mark.parametrize("model", MODELS)
def test_a_compact_step_gathers_once(ranks: list[dict[str, dict[str, dict[str, Tensor]]]], model: str) -> None:
    for rank in ranks:
        found = rank[model]
        assert {name: int(result.pop("gathers")) for name, result in found.items()} == {
            "once": ONCE, "twice": TWICE, "full": TWICE,
        }  # fmt: skip
        for key, value in found["once"].items():
            for other in ("twice", "full"):
                assert torch.equal(value, found[other][key]), (key, other)


def test_ranks_leave_out_what_they_drew(ranks: list[dict[str, dict[str, dict[str, Tensor]]]]) -> None:
    """Or the count would not show that ranks that skip other layers still gather in step."""
    assert len({tuple(rank[MODELS[0]]["once"]["left out"].tolist()) for rank in ranks}) == 2
