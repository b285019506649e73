"""Forecast activations against what the kernels save for backward, byte by byte but for masks and tables."""

import pytest
import torch

from shear_tron.architecture import Architecture
from shear_tron.forecast.job import Job
from shear_tron.forecast.memory import saved
from shear_tron.masks import LayerMasks
from shear_tron.model.attention import Positions
from shear_tron.model.split import Split
from shear_tron.model.transformer import Layer
from shear_tron.parallel.topology import Layout
from shear_tron.shape import Shape

SHAPE = Shape(hidden=64, layers=1, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=64)


@pytest.mark.parametrize("pruning", [False, True])
def test_saved_activations_are_those_autograd_keeps(pruning: bool) -> None:
    batch, time = 2, 256
    layer = Layer(Architecture(SHAPE), 0, Split())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sizes = ((64,), (4,), (96,), ())
    masks = LayerMasks(*(torch.rand(size).requires_grad_() for size in sizes)) if pruning else LayerMasks()
    x = torch.randn(batch * time, 64, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, Positions.of(Architecture(SHAPE), time, None, len(x), x.device, x.dtype), masks)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    found = sum(size for place, size in storages.items() if place not in weights)
    job = Job(Architecture(SHAPE), Layout(), batch, batch, time, compute_bytes=4, pruning=pruning, compact=False)
    assert saved(job) == pytest.approx(found, rel=0.05)
