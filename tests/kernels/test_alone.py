"""The kernels are usable alone: their wheel beside torch and triton, and nothing else, not even numpy."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH_AND_ITS_OWN = "torch torchgen typing_extensions.py filelock sympy mpmath networkx jinja2 markupsafe fsspec"
USE = """
import importlib.util, sys
for name in ("numpy", "transformers", "shear_tron"):
    assert importlib.util.find_spec(name) is None, name
import shear_kernels, torch
assert shear_kernels.__file__.startswith({folder!r}), shear_kernels.__file__
assert "torch._dynamo" not in sys.modules, "importing the kernels imported the compiler, which takes seconds"
x, weight, mask = torch.randn(4, 8), torch.ones(8, requires_grad=True), torch.ones(8)
shear_kernels.masked_rms_norm(x, weight, mask).sum().backward()
q = torch.randn(1, 5, 2, 8)
assert shear_kernels.masked_attention(q, q, q, torch.ones(2), window=3).shape == q.shape
assert shear_kernels.HAVE_TRITON is {triton}
if {triton}:
    from shear_kernels import activation, attention, exponentials, gather, layer_norm, norm, residual, rotary
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of kernels/, built offline by the setuptools that is here."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "kernels"  # a copy: setuptools leaves build folders
    subprocess.run(["cp", "-r", str(ROOT / "kernels"), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = folder.glob("shear_kernels-*.whl")
    return found


@pytest.mark.parametrize("triton", [True, False])
def test_a_wheel_works_alone(wheel: Path, tmp_path: Path, triton: bool) -> None:
    if triton:
        pytest.importorskip("triton")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    here = Path(torch.__file__).parents[1]
    for name in (*TORCH_AND_ITS_OWN.split(), *(["triton"] if triton else [])):
        if (here / name).exists():
            (tmp_path / name).symlink_to(here / name)
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE.format(folder=str(tmp_path), triton=triton)],
        env={"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in (tmp_path / "shear_kernels").iterdir()} >= {"py.typed", "reference.py"}
