"""Operations of a step, against counts by torch and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shear_tron.architecture import Architecture
from shear_tron.keep import Keep
from shear_tron.masks import Masks
from shear_tron.model.context import DENSE, Context
from shear_tron.model.flops import flops
from shear_tron.model.transformer import Transformer
from shear_tron.shape import Shape

SHAPE = Shape(hidden=16, layers=4, heads=4, kv_heads=2, head_dim=4, ffn=12, vocab=24)
MODEL = Architecture(SHAPE)


def half(units: int) -> torch.Tensor:
    return (torch.arange(units) % 2).float()


MASKS = Masks(half(16), torch.tensor([1.0, 0, 1, 1]), torch.tensor([[0.0, 1]] * 4), None, torch.stack([half(12)] * 4))


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_operations_are_those_torch_counts(compact: bool) -> None:
    keep = Keep.of(MASKS, SHAPE) if compact else None
    model, time = Transformer(MODEL), 8
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.zeros(2, time, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, Context(MASKS, keep) if compact else DENSE).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op))
    heads = (2 if compact else 4) * SHAPE.head_dim * (3 if compact else 4)  # rows of q over the kept layers
    expected = flops(MODEL, range(4), True, 2 * time, time, keep) - 6 * 2 * time * time * heads
    # our loss computes the head's logits once more in backward
    head = 2 * 2 * time * SHAPE.vocab * (8 if compact else 16)
    assert products in (expected, expected + head)


def test_a_closed_half_costs_a_quarter_of_the_matrices() -> None:
    dense = flops(MODEL, range(4), False, 10, 0)
    assert flops(MODEL, range(4), False, 10, 0, Keep.of(MASKS, SHAPE)) == dense / 4 * 3 / 4


def test_unit_counts_by_hand() -> None:
    # a layer: q 16x16, k and v 8x16, o 16x16, three of 12x16; scores: 2 halves of 8 x 16 wide
    layer = 256 + 128 + 128 + 256 + 3 * 192 + 8 * 16
    assert flops(MODEL, [0], True, 5, 8) == 6 * 5 * (layer + 24 * 16)
