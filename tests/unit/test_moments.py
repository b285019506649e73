"""Law: a gradient cut as moments are cut is the gradient of the model that was cut, soft masks and all."""

from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES, random_model, tokens_of

from shear_tron.masks import Masks
from shear_tron.model.context import Context
from shear_tron.model.transformer import Transformer
from shear_tron.pruning.extract import extract
from shear_tron.pruning.gates import Gates
from shear_tron.train.moments import POWERS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cut_gradient_is_the_cut_models(name: str) -> None:
    source = ARCHITECTURES[name]
    target = replace(source.shape, hidden=16, layers=3, heads=source.shape.heads_per_group * 2, kv_heads=2, ffn=12)
    gates = Gates(source.shape, target, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for logits in gates.logits.values():
        logits.data.copy_(torch.rand(logits.shape, generator=generator, dtype=torch.float64) * 4 - 1)
    masks = gates.decide()
    assert all(((mask > 0) & (mask < 0.99)).any() for _, mask in masks.items())  # soft

    tokens = tokens_of(source, time=12)
    masked = random_model(source)
    masked(tokens[:, :-1], tokens[:, 1:], Context(masks)).mean().backward()
    dense, weights = extract(masked.get_parameter, masks, source)
    small = Transformer(dense).double()
    small.load_state_dict(dict(weights))
    small(tokens[:, :-1], tokens[:, 1:]).mean().backward()

    def gradient(name: str) -> torch.Tensor:
        grad = masked.get_parameter(name).grad
        assert grad is not None
        return grad

    inverse = Masks(**{kind: torch.where(mask > 0, mask ** POWERS["exp_avg"], 0.0) for kind, mask in masks.items()})
    for name, cut in extract(gradient, inverse, source)[1]:
        torch.testing.assert_close(cut, small.get_parameter(name).grad, atol=1e-10, rtol=0, msg=name)
    assert POWERS["exp_avg_sq"] == 2 * POWERS["exp_avg"]  # squares of them
