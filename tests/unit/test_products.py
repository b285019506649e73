"""Weights that read one input: one product in a compact step, to the numbers of separate ones."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, masks_of, random_model, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

from shear_tron.keep import ALL, Keep, KeepLayer
from shear_tron.masks import Masks
from shear_tron.model.context import Context
from shear_tron.model.products import gathered, products, together
from shear_tron.params import layer_rows

# Matrices of a layer, and products of a compact step: q, k and v together, o; gate and up together, down.
LAYERS = {"llama, grouped": (7, 4), "gpt_neox": (6, 4), "qwen3": (7, 4)}


class Multiplied(TorchDispatchMode):
    """How many matrix products ran."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.name() in ("aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LAYERS)
def test_a_compact_step_multiplies_once_where_weights_read_one_input(name: str) -> None:
    source = ARCHITECTURES[name]
    model, tokens = random_model(source), tokens_of(source)
    masks = masks_of(source.shape, {"hidden": 12, "kv_heads": 2, "ffn": 8}, soft=True)
    found = []
    for under, keep in (
        (masks, None),
        (masks, Keep.of(masks, source.shape)),
        (Masks(), Keep.of(Masks(), source.shape)),
    ):
        with Multiplied() as multiplied, torch.no_grad():
            model(tokens[:, :-1], tokens[:, 1:], Context(under, keep))
        found.append((multiplied.count - 1) / source.shape.layers)  # the head's is one more
    separate, joined = LAYERS[name]
    assert found == [separate, joined, separate]  # nothing is copied to be joined


@pytest.mark.parametrize("name", LAYERS)
def test_products_of_one_buffer_are_those_of_its_parts(name: str) -> None:
    """Values and gradients, of the input, weights and biases; also where only one product is asked for."""
    source = ARCHITECTURES[name]
    keep = Keep.of(masks_of(source.shape, {"hidden": 12, "kv_heads": 2, "ffn": 8}, soft=True), source.shape).layer(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    for group in together(layer_rows(source)):
        rows = [row for row in layer_rows(source) if row.leaf.removesuffix("_bias") in {row.leaf for row in group}]
        weights = {
            row.leaf: torch.randn(row.size(source.shape), dtype=torch.float64, generator=generator, requires_grad=True)
            for row in rows
        }
        parts = {row.leaf: keep.select(weights[row.leaf], row) for row in rows}
        leaves, found = [row.leaf for row in group], []
        for own in (parts, parts | gathered(weights, keep, group)):
            outputs = products(x, own, *leaves)
            upstream = [torch.full_like(out, number) for number, out in enumerate(outputs, 1)]
            gradients = torch.autograd.grad(outputs, [x, *weights.values()], upstream, retain_graph=True)
            (alone,) = torch.autograd.grad(outputs[1], x, upstream[1])
            found.append([*outputs, *gradients, alone])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        assert torch.equal(found[0][0], F.linear(x, parts[leaves[0]], parts.get(f"{leaves[0]}_bias")))


def test_what_is_kept_whole_and_what_lacks_a_bias_is_not_joined() -> None:
    rows = layer_rows(ARCHITECTURES["llama"])
    (qkv, _) = together(rows)
    weights = {row.leaf: torch.zeros(row.size(ARCHITECTURES["llama"].shape)) for row in qkv}
    only_q = KeepLayer({qkv[0].dims[0]: torch.tensor([0])})
    assert gathered(weights, ALL, qkv) == {}
    assert [row.leaf for row in qkv if only_q.cuts(row)] == ["q"]
    assert gathered(weights, only_q, qkv) == {}
    uneven = replace(ARCHITECTURES["llama"], biases=frozenset({"q"}))
    assert [[row.leaf for row in group] for group in together(layer_rows(uneven))] == [["gate", "up"]]
