"""Runs the kernel laws of this folder under Triton's interpreter: proof on a machine with no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already under the interpreter")
def test_laws_hold_under_the_interpreter() -> None:
    """The interpreter must be chosen before triton is imported, and cannot share a process with the compiler."""
    triton = pytest.importorskip("triton")
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        pytest.fail(
            f"the interpreter of triton {triton.__version__} reads scalars in a way that numpy {numpy.__version__} "
            "refuses (numpy 2.4 and later); pip install 'numpy<2.4', or triton 3.7"
        )
    laws = Path(__file__).parent.glob("*_laws.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider", *sorted(map(str, laws))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,  # two idle cores take a third of it
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 450, f"only {passed[1]} laws ran"


def _release(package: ModuleType) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in package.__version__.split(".")[:2])
