"""Learning from a teacher: its final states come along with a microbatch, and both models' logits stay unmade."""

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
        losses = shear_kernels.vocab_distillation(
            states,
            head,
            teacher.states,
            teacher.head,
            labels.flatten(),
            self.temperature,
            first=split.rank * head.shape[0],
            all_reduce_max=split.all_reduce_max,
            all_reduce_sum=split.all_reduce_sum,
        )
        counted = (labels >= 0).sum(-1).clamp(min=1)
        return torch.stack([loss.view_as(labels).sum(-1) / counted for loss in losses])


class HandOver:
    """A teacher's readout: no loss, its final states instead, in the order of its microbatches.

    The head is kept from the first call on: sharded weights are whole only while a model runs.
    """

    terms: tuple[str, ...] = ("next_token",)
    weights: tuple[float, ...] = (1.0,)

    def __init__(self) -> None:
        self.given: list[TeacherStates] = []
        self._head: Tensor | None = None

    def __call__(self, states: Tensor, head: Tensor, labels: Tensor, split: Split, context: Context) -> Tensor:
        if self._head is None:
            self._head = head.detach().clone()
        self.given.append(TeacherStates(states.detach(), self._head))
        precision = torch.promote_types(states.dtype, torch.float32)
        return torch.zeros(1, len(labels), dtype=precision, device=states.device)
