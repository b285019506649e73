"""Law: a model whose residual stream is turned computes what it did, to 1e-10 in float64."""

from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES, InMemory, random_model, tokens_of, weights_of
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import sizes
from shear_tron.model.context import Context
from shear_tron.model.transformer import Transformer
from shear_tron.params import params
from shear_tron.pruning import rotate
from shear_tron.pruning.extract import extract
from shear_tron.pruning.rotate import Turned, principal_axes, untied
from shear_tron.pruning.scored import Scored

SOURCE = ARCHITECTURES["llama, grouped"]
SHAPE = SOURCE.shape
# Beside every model whose norms can be turned, facts that none of them has together.
SOURCES = {name: each for name, each in ARCHITECTURES.items() if each.norm == "rms"} | {
    "biases and q/k norms": replace(SOURCE, biases=frozenset({"q", "k", "v", "o", "down"}), qk_norm=True),
    "parallel residual": replace(SOURCE, parallel_residual=True),
    "parallel residual, tied": replace(ARCHITECTURES["llama, tied"], parallel_residual=True),
}


def weights(source: Architecture) -> InMemory:
    return InMemory(weights_of(random_model(source)))


def model(weights: Turned) -> Transformer:
    made = Transformer(weights.architecture).double()
    made.load_state_dict({each.name: weights.read(each.name) for each in params(weights.architecture)})
    return made


def random_axes(hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("turned", [False, True], ids=["absorbed", "turned"])
def test_a_turned_model_computes_the_same(name: str, turned: bool) -> None:
    source = SOURCES[name]
    other = Turned(weights(source), source, random_axes(source.shape.hidden) if turned else None)
    tokens = tokens_of(source, time=18)
    expected, found = random_model(source)(tokens), model(other)(tokens)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    for each in params(untied(source)):
        if each.row.leaf in ("attn_norm", "mlp_norm", "norm"):
            assert (other.read(each.name) == 1).all()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - SOURCES.keys()))
def test_norms_that_take_off_a_mean_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="needs RMS norms"):
        untied(ARCHITECTURES[name])


@pytest.mark.parametrize("name", SOURCES)
def test_parts_of_turned_weights_are_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is all the same how many rows or columns are turned at once."""
    source = SOURCES[name]
    turned = Turned(weights(source), source, random_axes(source.shape.hidden))
    for each in params(source):
        if (axis := each.row.cut_axis) is not None:
            whole = turned.read(each.name)
            with monkeypatch.context() as few:
                few.setattr(rotate, "PIECE", 2 * source.shape.hidden)
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
    turned = Turned(weights(SOURCE), SOURCE, random_axes(SHAPE.hidden))
    dense, tensors = extract(turned.read, masks, SOURCE)
    small = Transformer(dense).double()
    small.load_state_dict(dict(tensors))
    for name, weight in small.named_parameters():
        if "norm" in name:
            torch.testing.assert_close(weight, value.expand(16))
    tokens = tokens_of(SOURCE, time=18)
    masked = model(turned)(tokens, context=Context(masks))
    torch.testing.assert_close(masked, small(tokens), atol=1e-10, rtol=0)
