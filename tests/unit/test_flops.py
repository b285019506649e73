"""Operations of a step, against counts by torch and by hand."""

import pytest
import torch
from models import ARCHITECTURES, kept_of, masks_of, random_model, tokens_of
from torch.utils.flop_counter import FlopCounterMode

from shear_tron.keep import Keep
from shear_tron.masks import Masks
from shear_tron.model.context import DENSE, Context
from shear_tron.model.flops import flops

GROUPED = ARCHITECTURES["llama, grouped"]


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_operations_are_those_torch_counts(name: str, compact: bool) -> None:
    """Of all products with weights; torch does not count those of attention's scores in every backend."""
    architecture = ARCHITECTURES[name]
    shape, tokens = architecture.shape, tokens_of(architecture, time=8)
    masks = masks_of(shape, kept_of(shape), soft=False)
    keep = Keep.of(masks, shape) if compact else None
    with FlopCounterMode(display=False) as counter:
        random_model(architecture)(tokens, tokens, Context(masks, keep) if compact else DENSE).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(number for op, number in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    expected = flops(architecture, range(shape.layers), True, tokens.numel(), 0, keep)
    # our loss computes the head's logits once more in backward
    head = 2 * tokens.numel() * shape.vocab * (kept_of(shape)["hidden"] if compact else shape.hidden)
    assert products in (expected, expected + head)


def test_a_closed_half_costs_a_quarter_of_the_matrices() -> None:
    def half(units: int) -> torch.Tensor:
        return (torch.arange(units) % 2).float()

    layers = torch.tensor([1.0, 0, 1, 1])
    masks = Masks(half(24), layers, kv_heads=torch.stack([half(4)] * 4), ffn=torch.stack([half(20)] * 4))
    dense = flops(GROUPED, range(4), False, 10, 0)
    assert flops(GROUPED, range(4), False, 10, 0, Keep.of(masks, GROUPED.shape)) == dense / 4 * 3 / 4


def test_unit_counts_by_hand() -> None:
    # a layer: q 48x24, k and v 24x24, o 24x48, three of 20x24; scores: 2 halves of 8 x 48 wide
    layer = 48 * 24 + 2 * 24 * 24 + 24 * 48 + 3 * 20 * 24 + 8 * 48
    assert flops(GROUPED, [0], True, 5, 8) == 6 * 5 * (layer + 40 * 24)
