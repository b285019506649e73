"""Which implementation serves a call."""

import os
import subprocess
import sys

import pytest
import shear_kernels
import torch
from shear_kernels import dense_attention, reference

WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
import shear_kernels, torch
x = torch.ones(2, 8)
assert shear_kernels.masked_swiglu(x, x).shape == (2, 8)
assert "triton" not in sys.modules
try:
    shear_kernels.masked_swiglu(x, x, backend="triton")
except ValueError as error:
    assert "needs triton" in str(error), error
else:
    raise AssertionError("served without triton")
"""


def child(code: str, **environment: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importable_and_usable_without_triton() -> None:
    child(WITHOUT_TRITON)


def test_reference_on_a_cpu_and_kernels_under_the_interpreter() -> None:
    code = """
import shear_kernels, sys, torch
x = torch.ones(2, 8)
shear_kernels.masked_swiglu(x, x)
assert ("shear_kernels.swiglu" in sys.modules) is {expected}
shear_kernels.masked_swiglu(x.double(), x.double())  # float64: the definition
assert shear_kernels.fuses_masks(x) is {expected} and not shear_kernels.fuses_masks(x.double())
"""
    child(code.format(expected=False))
    pytest.importorskip("triton")
    child(code.format(expected=True), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_float64_is_exact_everywhere() -> None:
    gate, up, mask = (torch.randn(4, 8, dtype=torch.float64) for _ in range(3))
    assert torch.equal(shear_kernels.masked_swiglu(gate, up, mask[0]), reference.masked_swiglu(gate, up, mask[0]))


def test_ops_have_the_definitions_signatures() -> None:
    import inspect

    names = "masked_attention masked_swiglu masked_gelu masked_rms_norm masked_layer_norm add_rms_norm rope select"
    for name in names.split():
        ours, theirs = (
            list(inspect.signature(getattr(m, name)).parameters.values()) for m in (shear_kernels, reference)
        )
        assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs], name
        assert (ours[-1].name, ours[-1].default) == ("backend", None), name


@pytest.mark.parametrize("op", ["masked_swiglu", "masked_attention"])
def test_unknown_backend_is_named(op: str) -> None:
    x = torch.ones(1, 2, 1, 8)
    arguments = (x, x) if op == "masked_swiglu" else (x, x, x)
    with pytest.raises(ValueError, match="backend='cuda' is not one of"):
        getattr(shear_kernels, op)(*arguments, backend="cuda")


def test_dense_backend_then_gate_is_the_definition() -> None:
    q, mask = torch.randn(1, 6, 4, 8), torch.tensor([0.0, 1.0, 0.5, 0.2])
    ours = shear_kernels.masked_attention(q, q, q, mask, backend="sdpa")
    assert torch.equal(ours, reference.masked_attention(q, q, q, mask))
    with pytest.raises(ValueError, match="knows no document boundaries"):
        shear_kernels.masked_attention(q, q, q, cu_seqlens=torch.tensor([0, 6]), backend="sdpa_flash")


def test_the_measured_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_attention, "MEASURED", {("G", False): "sdpa_cudnn", ("F", True): "flash_attn"})
    assert dense_attention.choose("G", gated=False, edges=False) == "sdpa_cudnn"
    assert dense_attention.choose("G", gated=False, edges=True) == "triton"  # cuDNN knows no documents
    assert dense_attention.choose("G", gated=True, edges=False) == dense_attention.DEFAULT
    monkeypatch.setattr(dense_attention, "find_spec", lambda name: None)
    assert dense_attention.choose("F", gated=True, edges=False) == dense_attention.DEFAULT  # not installed
