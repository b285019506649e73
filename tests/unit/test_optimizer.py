"""Adam's state as a checkpoint wants it filled."""

import torch

from shear_tron.train.config import OptimizerConfig
from shear_tron.train.optimizer import adamw, start_moments


def test_a_fused_optimizer_finds_its_state_where_its_parameters_are() -> None:
    """On CUDA a fused AdamW refuses a step count on the CPU; a parameter on the meta device shows it without a GPU."""
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = adamw([parameter], OptimizerConfig())
    start_moments(optimizer, 5)
    assert optimizer.param_groups[0]["fused"]
    assert {name: value.device.type for name, value in optimizer.state[parameter].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }
    parameter.grad = torch.empty(3, device="meta")
    optimizer.step()
