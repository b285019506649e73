"""Learning from a teacher: its final states, or samples of it, come with a microbatch; all logits stay unmade."""

import shear_kernels
import torch
from torch import Tensor

from shear_tron.model.context import Context, TeacherStates
from shear_tron.model.readout import NEXT_TOKEN
from shear_tron.model.split import Split


class Distill:
    """``(1 - alpha)`` of the next-token loss and ``alpha`` of ``temperature^2 KL(teacher || student)``, a token's mean.

    A microbatch without a teacher (an evaluation) has a divergence of 0. See ``shear_tron.model.readout.Readout``.
    """

    terms: tuple[str, ...] = ("next_token", "divergence")

    def __init__(self, alpha: float, temperature: float = 1.0) -> None:
        self.weights: tuple[float, ...] = (1 - alpha, alpha)
        self.temperature = temperature

    def __call__(self, states: Tensor, head: Tensor, labels: Tensor, split: Split, context: Context) -> Tensor:
        teacher = context.teacher
        if teacher is None:
            alone = NEXT_TOKEN(states, head, labels, split, context)
            return torch.cat((alone, torch.zeros_like(alone)))
        given = labels.flatten(), self.temperature, split.rank * head.shape[0]
        join = split.all_reduce_max, split.all_reduce_sum
        if isinstance(teacher, TeacherStates):
            losses = shear_kernels.vocab_distillation(states, head, teacher.states, teacher.head, *given, *join)
        else:
            sampled = teacher.ids, teacher.shares, teacher.information
            losses = shear_kernels.sampled_distillation(states, head, *sampled, *given, *join)
        counted = (labels >= 0).sum(-1).clamp(min=1)
        return torch.stack([loss.view_as(labels).sum(-1) / counted for loss in losses])


class FinalStates:
    """A teacher's readout: no loss but the states themselves, [tokens, hidden]. ``head`` is that of the latest call."""

    terms: tuple[str, ...] = ("next_token",)
    weights: tuple[float, ...] = (1.0,)
    head: Tensor

    def __call__(self, states: Tensor, head: Tensor, labels: Tensor, split: Split, context: Context) -> Tensor:
        self.head = head
        return states
