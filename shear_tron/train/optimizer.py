"""AdamW over this rank's parameters, and its moments by name, as checkpoints hold them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from shear_tron.train.config import OptimizerConfig


def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def start_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give every parameter Adam's state after ``step`` updates, moments zero: what a checkpoint fills.

    The count of steps lies where the parameter does, as a fused optimizer wants it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.full((), float(step), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Let Adam's moments be those after so many updates."""
    for state in optimizer.state.values():
        state["step"].fill_(float(updates))


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adam's moments of named parameters, by the name they have in a checkpoint."""
    return {
        f"adam.{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def finite_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all gradients are finite, and their squares, of which Adam keeps a mean."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return all(bool(gradient.square().isfinite().all()) for gradient in gradients)
