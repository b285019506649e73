"""The check that guards every row of the benchmark passes for right kernels and fails for wrong ones."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_law import DEVICE

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))
import run
import shapes

TINY = shapes.ModelShape("tiny", 40, 4, 2, 32, 72)


@pytest.mark.parametrize("make", [make for make, _, _ in shapes.GRID])
def test_check_passes_the_kernels(make: shapes.Make) -> None:
    run.check(make(TINY, 24, 0.5, 24), DEVICE)


def test_check_stops_a_wrong_kernel() -> None:
    right = shapes.swiglu(TINY, 16, 0.25, 16)
    wrong = {**right.rivals, "kernel": lambda **t: right.definition(**t) * 1.01}
    with pytest.raises(ValueError, match="masked_swiglu tiny: output 0 errs by"):
        run.check(replace(right, rivals=wrong), DEVICE, torch.float32)
