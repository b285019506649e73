"""What is seen of activations is what transformers' own hooks see, and the same in every layout: units' scores, and the
second moments that rotation turns by."""

from functools import cache
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, InMemory, random_model, weights_of
from ranks import run
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import write
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, Topology, start
from shear_tron.train.activations import activation_scores
from shear_tron.train.rotation import second_moments

BATCH, TIME, BATCHES = 4, 6, 2
LAYOUTS = {
    "fsdp2": Layout(shard=2),
    "tp4": Layout(tp=4, sequence=False),
    "tp2+sp": Layout(tp=2),
    "pp2 interleaved": Layout(pp=2, schedule="interleaved", stages_per_rank=2),
    "all on 8": Layout(pp=2, shard=2, tp=2),
}
SUBJECT = "llama, grouped"
CASES = [(layout, SUBJECT) for layout in LAYOUTS] + [("all on 8", model) for model in ARCHITECTURES if model != SUBJECT]
Seen = dict[str, Tensor]


def start_weights(architecture: Architecture) -> InMemory:
    """The weights to start from, the same on every rank."""
    return InMemory(weights_of(random_model(architecture)))


def batches(vocab: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(vocab, (BATCH, TIME + 1), generator=generator) for _ in range(BATCHES)]
    return [(each[:, :-1], each[:, 1:]) for each in windows]


def seen(layout: Layout, models: list[str]) -> dict[str, Seen]:
    """Of these models, in one set of processes."""
    topology = start(layout, torch.device("cpu"))
    return {name: _seen(ARCHITECTURES[name], topology) for name in models}


def _seen(architecture: Architecture, topology: Topology) -> Seen:
    layout, weights = topology.layout, start_weights(architecture)
    stages = [
        shard(stage, weights, topology, torch.float64, torch.float64)
        for stage in build_stages(architecture, topology, "none")
    ]
    engine = Engine(stages, topology, BATCH // layout.dp, 1, TIME, torch.float64)
    own = [tuple(x.chunk(layout.dp)[topology.dp_rank] for x in each) for each in batches(architecture.shape.vocab)]
    scores = activation_scores(engine, own, topology)
    return scores | {"moments": second_moments(engine, own, topology)}


@cache
def alone() -> dict[str, Seen]:
    return run(1, seen, Layout(), list(ARCHITECTURES))[0]


@cache
def ranks_of(layout: str) -> list[dict[str, Seen]]:
    return run(LAYOUTS[layout].world, seen, LAYOUTS[layout], [model for place, model in CASES if place == layout])


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_every_layout_sees_the_same(layout: str, model: str) -> None:
    expected = alone()[model]
    for results in ranks_of(layout):
        result = results[model]
        assert result.keys() == expected.keys()
        for name, value in result.items():
            torch.testing.assert_close(
                value, expected[name], atol=1e-10, rtol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_what_is_seen_is_what_hooks_of_transformers_see(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    source = ARCHITECTURES[SUBJECT]
    write(tmp_path / "model", source, start_weights(source).weights.items(), dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model").double()
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    streams: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def flat(x: Tensor) -> Tensor:
        return x.detach().flatten(0, 1)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, x, n=name: inputs.setdefault(n, []).append(flat(x[0])))
        if name.endswith("norm"):
            module.register_forward_hook(lambda _, __, y, n=name: outputs.setdefault(n, []).append(flat(y)))
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _, x, y, n=number: streams.setdefault(n, []).append(
                (flat(x[0]), flat(y[0] if isinstance(y, tuple) else y))
            )
        )
    with torch.no_grad():
        for tokens, _ in batches(source.shape.vocab):
            model(tokens)
    scores = alone()[SUBJECT]
    normed = {name: torch.cat(each) for name, each in outputs.items()}
    close = {"atol": 1e-4, "rtol": 1e-4}  # weights are stored, and transformers turns q and k, in float32
    torch.testing.assert_close(scores["hidden"], sum(each.abs().mean(0) for each in normed.values()), **close)
    moments = sum(each.T @ each / len(each) for each in normed.values())
    torch.testing.assert_close(scores["moments"], moments, **close)
    assert len(normed) == 2 * 4 + 1
    for number in range(4):
        prefix = f"model.layers.{number}"
        columns = torch.cat(inputs[f"{prefix}.mlp.down_proj"]).abs().mean(0)
        torch.testing.assert_close(scores["ffn"][number], columns, **close)
        heads = torch.cat(inputs[f"{prefix}.self_attn.o_proj"]).unflatten(1, (8, 6)).norm(dim=-1).mean(0).view(4, 2)
        torch.testing.assert_close(scores["kv_heads"][number], heads.sum(1), **close)
        torch.testing.assert_close(scores["heads_per_group"][number], heads.sum(0), **close)
        before, after = (torch.cat(each) for each in zip(*streams[number], strict=True))
        influence = (1 - torch.cosine_similarity(before, after)).mean()
        torch.testing.assert_close(scores["layers"][number], influence, **close)
