"""Which layers a pipeline stage has: runs in order, as even as can be with the output head counted."""

from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from shear_tron.architecture import Architecture
from shear_tron.config import ConfigError
from shear_tron.parallel.config import ParallelConfig
from shear_tron.parallel.topology import Layout
from shear_tron.shape import Shape

LLAMA_2_13B = Shape(hidden=5120, layers=40, heads=40, kv_heads=40, head_dim=128, ffn=13824, vocab=32000)
SMOLLM2_135M = Shape(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, tied=True)


def lengths(shape: Shape, stages: int) -> list[int]:
    layout, architecture = Layout(pp=stages), Architecture(shape)
    spans = [layout.layers(stage, architecture) for stage in range(stages)]
    assert [layer for span in spans for layer in span] == list(range(shape.layers))
    return [len(span) for span in spans]


@pytest.mark.parametrize(
    ("shape", "stages", "expected"),
    [
        (LLAMA_2_13B, 3, [13, 14, 13]),  # the head weighs half a layer
        (LLAMA_2_13B, 4, [10, 10, 10, 10]),
        (replace(LLAMA_2_13B, layers=32), 3, [11, 11, 10]),
        (SMOLLM2_135M, 2, [19, 11]),  # the head weighs eight layers
        (SMOLLM2_135M, 3, [12, 13, 5]),
        (replace(SMOLLM2_135M, layers=3), 3, [1, 1, 1]),  # never none
    ],
)
def test_the_slowest_stage_is_as_fast_as_can_be(shape: Shape, stages: int, expected: list[int]) -> None:
    assert lengths(shape, stages) == expected


def test_stages_of_an_interleaved_schedule_are_cut_likewise() -> None:
    layout, architecture = Layout(pp=3, schedule="interleaved", stages_per_rank=2), Architecture(LLAMA_2_13B)
    held = [sum(len(layout.layers(stage, architecture)) for stage in layout.stages(rank)) for rank in range(3)]
    assert sorted(held) == [13, 13, 14]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_stage_has_a_layer(name: str) -> None:
    for stages in range(1, 5):
        assert min(lengths(ARCHITECTURES[name].shape, stages)) >= 1


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pp \* stages=41 is more than the model's layers=40"):
        Layout.plan(ParallelConfig(pp=41), LLAMA_2_13B, 41)


def test_why_there_is_no_zero_bubble() -> None:
    """torch's split backward gives gradients to inputs and to parameters: masks, which are neither, would get none."""
    layer, mask, x = torch.nn.Linear(4, 4), torch.rand(4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    out = layer(x) * mask
    (found,), groups = stage_backward_input([out], [torch.ones_like(out)], [x], layer.parameters())
    stage_backward_weight(layer.parameters(), groups)
    assert found is not None
    assert layer.weight.grad is not None
    assert mask.grad is None
    with pytest.raises(ValueError, match="gradients of masks"):
        ParallelConfig(pp=2, schedule="zbv")  # type: ignore[arg-type]
