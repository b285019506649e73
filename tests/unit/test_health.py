"""What a step is skipped for."""

import pytest
import torch

from shear_tron.train.evaluation import DomainLosses
from shear_tron.train.health import Health


@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf")])
def test_a_norm_that_is_no_gradients_is_a_problem(norm: float) -> None:
    losses = DomainLosses(("web",), torch.ones(1).double(), torch.ones(1).double())
    assert Health(3).problem(losses, norm, True) == f"the gradient norm is {norm}"
    assert Health(3).problem(losses, 1e-30, True) is None
