"""What is seen of a model that is written."""

import io

import pytest
import torch

from shear_tron.architecture import Architecture
from shear_tron.params import count, params
from shear_tron.shape import Shape
from shear_tron.train.outputs import shown

ARCHITECTURE = Architecture(Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16, vocab=32))


def test_an_export_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    tensors = [(param.name, torch.zeros(param.size)) for param in params(ARCHITECTURE)]
    assert [name for name, _ in shown(tensors, ARCHITECTURE, "models/small")] == [name for name, _ in tensors]
    total = f"{count(ARCHITECTURE) / 1000:.2f}k"
    assert "writing models/small: 0.00/" in said.getvalue()
    assert f"{total}/{total}" in said.getvalue()
