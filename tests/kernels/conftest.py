"""Kernel laws run where kernels run: on a GPU, or in Triton's interpreter, which wants a process of its own.

Without a GPU, ``test_interpreter.py`` starts that process; a law collected anywhere else is skipped. On a GPU every law
carries the marker ``gpu``.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for kernel_law.py, whatever pytest's import mode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name.endswith("_laws.py"):
            if torch.cuda.is_available():
                item.add_marker(pytest.mark.gpu)
            elif not INTERPRETED:
                item.add_marker(pytest.mark.skip(reason="runs in the interpreter's process, see test_interpreter.py"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    """Torch fills every new tensor with NaN, so that an output a kernel forgot to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
