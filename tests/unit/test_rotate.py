"""Law: a model whose residual stream is turned computes what it did, to 1e-10 in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import sizes
from shear_tron.model.context import Context
from shear_tron.model.transformer import Transformer
from shear_tron.params import params
from shear_tron.pruning.extract import extract
from shear_tron.pruning.rotate import Turned, principal_axes, untied
from shear_tron.pruning.scored import Scored
from shear_tron.shape import Shape

SHAPE = Shape(hidden=24, layers=3, heads=8, kv_heads=4, head_dim=6, ffn=20, vocab=40)
SOURCE = Architecture(SHAPE)


class InMemory:
    def __init__(self, architecture: Architecture) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            each.name: (1.0 if "norm" in each.name else 0.0)
            + 0.3 * torch.randn(each.size, generator=generator, dtype=torch.float64)
            for each in params(architecture)
        }

    def read(self, name: str) -> Tensor:
        return self.weights[name].clone()

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        return self.weights[name].narrow(axis, start, stop - start).clone()


def model(architecture: Architecture, read) -> Transformer:
    made = Transformer(architecture).double()
    made.load_state_dict({each.name: read(each.name) for each in params(architecture)})
    return made


def random_axes() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(SHAPE.hidden, SHAPE.hidden, generator=generator, dtype=torch.float64)).Q


FACTS = {
    "llama": {},
    "biases and q/k norms": {"biases": frozenset({"q", "k", "v", "o", "down"}), "qk_norm": True},
    "parallel residual": {"parallel_residual": True},
}


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS.keys())
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("turned", [False, True], ids=["absorbed", "turned"])
def test_a_turned_model_computes_the_same(facts: dict[str, Any], tied: bool, turned: bool) -> None:
    source = Architecture(replace(SHAPE, tied=tied), **facts)
    weights = InMemory(source)
    other = Turned(weights, source, random_axes() if turned else None)
    tokens = torch.arange(36).view(2, 18)
    expected, found = model(source, weights.read)(tokens), model(untied(source), other.read)(tokens)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    for each in params(untied(source)):
        if each.row.leaf in ("attn_norm", "mlp_norm", "norm"):
            assert (other.read(each.name) == 1).all()


def test_parts_of_turned_weights_are_parts() -> None:
    turned = Turned(InMemory(SOURCE), SOURCE, random_axes())
    for each in params(SOURCE):
        if (axis := each.row.cut_axis) is not None:
            whole = turned.read(each.name)
            part = turned.read_slice(each.name, axis, 2, 7)
            torch.testing.assert_close(part, whole.narrow(axis, 2, 5), atol=1e-12, rtol=0)


def test_principal_axes_are_orthogonal_and_hold_the_energy_in_order() -> None:
    generator = torch.Generator().manual_seed(2)
    stream = torch.randn(500, 24, generator=generator, dtype=torch.float64) @ torch.randn(
        24, 24, generator=generator, dtype=torch.float64
    )
    energy, axes = principal_axes(stream.T @ stream / 500)
    torch.testing.assert_close(axes.T @ axes, torch.eye(24, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close((stream @ axes).square().mean(0), energy, rtol=1e-10, atol=1e-10)
    assert (energy[:-1] >= energy[1:]).all()


def test_norms_are_rescaled_by_the_hidden_masks_value() -> None:
    """What the formula says of a norm's weight, sqrt(share of energy * d / d'), the cut model's norms have; and the
    masked model, whose stream is scaled by the value too, is the cut one."""
    target = replace(SHAPE, hidden=16, ffn=12)
    method = Scored(SOURCE, target, 0, dtype=torch.float64, rotated=True)
    method.set_scores({kind: torch.rand(size) for kind, size in sizes(SHAPE).items()})
    energy = torch.linspace(3, 0.1, 24, dtype=torch.float64)
    method.set_energy(energy)
    method.close(0)
    masks = method.decide()
    value = (energy[:16].sum() / energy.sum() * 24 / 16).sqrt()
    assert masks.hidden is not None
    torch.testing.assert_close(masks.hidden, torch.cat((value.expand(16), torch.zeros(8))))  # the first ones
    turned = Turned(InMemory(SOURCE), SOURCE, random_axes())
    dense, weights = extract(turned.read, masks, SOURCE)
    small = Transformer(dense).double()
    small.load_state_dict(dict(weights))
    for name, weight in small.named_parameters():
        if "norm" in name:
            torch.testing.assert_close(weight, value.expand(16))
    tokens = torch.arange(36).view(2, 18)
    masked = model(SOURCE, turned.read)(tokens, context=Context(masks))
    torch.testing.assert_close(masked, small(tokens), atol=1e-10, rtol=0)


def test_norms_that_take_off_a_mean_are_refused() -> None:
    with pytest.raises(ValueError, match="needs RMS norms"):
        untied(replace(SOURCE, norm="layer"))
