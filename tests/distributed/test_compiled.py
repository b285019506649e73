"""``train.compile``: a compiled layer gives what the layer gives, in one graph, in every kind of layout.

The backend ``aot_eager`` traces forward and backward and runs what it traced; ``inductor`` (make slow) also generates
code, which needs a C++ compiler.
"""

from dataclasses import replace
from functools import partial
from shutil import which
from unittest.mock import patch

import pytest
import torch
from models import ARCHITECTURES, InMemory, random_model, weights_of
from ranks import run
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from shear_tron.architecture import Architecture
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, Topology, start

LAYOUTS = {
    "one": Layout(),
    "fsdp2": Layout(shard=2),
    "tp2": Layout(tp=2, sequence=False),
    "tp2+sp": Layout(tp=2),
    "pp2": Layout(pp=2),
}
MICROBATCHES, TIME = 2, 6


def architecture(name: str) -> Architecture:
    return replace(ARCHITECTURES[name], shape=replace(ARCHITECTURES[name].shape, layers=2))


def step(model: str, topology: Topology, checkpointing: str, compiled: bool) -> dict[str, Tensor]:
    facts = architecture(model)
    stages = build_stages(facts, topology, checkpointing, compiled=compiled)
    weights = InMemory(weights_of(random_model(facts)))
    stages = [shard(stage, weights, topology, torch.float64, torch.float64) for stage in stages]
    engine = Engine(stages, topology, MICROBATCHES, 1, TIME, torch.float64)
    windows = torch.randint(40, (MICROBATCHES, TIME + 1), generator=torch.Generator().manual_seed(topology.dp_rank))
    losses = engine.train(windows[:, :-1], windows[:, 1:], None)
    sync.sum_tied(stages, topology)
    found = {"losses": engine.broadcast(losses, MICROBATCHES)}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            found[name] = parameter.grad.full_tensor()
    return found


def both(layout: Layout, models: list[str], checkpointing: str, backend: str) -> dict[str, list[dict[str, Tensor]]]:
    """Of each model: losses and gradients of the plain and of the compiled layers, and how many graphs they made."""
    topology, found = start(layout, torch.device("cpu")), {}
    for model in models:
        plain = step(model, topology, checkpointing, compiled=False)
        counters.clear()
        torch._dynamo.reset()
        with patch.object(torch, "compile", partial(torch.compile, backend=backend)):
            compiled = step(model, topology, checkpointing, compiled=True)
        found[model] = [plain, compiled, {"graphs": torch.tensor(counters["stats"]["unique_graphs"])}]
    return found


def require_equal(layout: str, models: list[str], checkpointing: str, backend: str) -> None:
    for rank in run(LAYOUTS[layout].world, both, LAYOUTS[layout], models, checkpointing, backend):
        assert rank.keys() == set(models)
        for plain, compiled, graphs in rank.values():
            assert graphs["graphs"] >= 1
            assert plain.keys() == compiled.keys()
            for key, value in plain.items():
                torch.testing.assert_close(compiled[key], value, atol=1e-10, rtol=0, msg=lambda t, k=key: f"{k}: {t}")


def test_layers_trace_whole_under_tensor_and_sequence_parallelism() -> None:
    require_equal("tp2+sp", ["llama, grouped"], "none", "aot_eager")


@pytest.mark.rehearsal
@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="inductor generates C++, and there is no compiler")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layers_give_what_layers_give(layout: str, checkpointing: str) -> None:
    require_equal(layout, ["llama, grouped", "llama, tied", "qwen3", "gpt_neox"], checkpointing, "inductor")
