"""What the last stage makes of its final states: by default the next-token loss, or another loss that is injected."""

from typing import Protocol

import shear_kernels
import torch
from torch import Tensor

from shear_tron.model.context import Context
from shear_tron.model.split import Split


class Readout(Protocol):
    """From final states to losses.

    ``terms`` names what a call returns, [terms, batch]; the first is always the next-token loss in nats per token,
    which drives the mixture of domains. ``weights`` are those of the terms in what training minimises.
    """

    terms: tuple[str, ...]
    weights: tuple[float, ...]

    def __call__(self, states: Tensor, head: Tensor, labels: Tensor, split: Split, context: Context) -> Tensor:
        """states: [tokens, hidden], the final norm's output for all tokens; head: [vocab (this rank's part), hidden];
        labels: [batch, time] int64, negative where there is nothing to predict. Returns [terms, batch], float32
        (float64 for a float64 model), the same on all tensor-parallel ranks."""
        ...


class NextToken:
    """Mean next-token cross entropy of each sequence; a sequence without labels has loss 0."""

    terms: tuple[str, ...] = ("next_token",)
    weights: tuple[float, ...] = (1.0,)

    def __call__(self, states: Tensor, head: Tensor, labels: Tensor, split: Split, context: Context) -> Tensor:
        loss = shear_kernels.vocab_cross_entropy(
            states,
            head,
            labels.flatten(),
            first=split.rank * head.shape[0],
            all_reduce_max=split.all_reduce_max,
            all_reduce_sum=split.all_reduce_sum,
        )
        means = loss.view_as(labels).sum(-1) / (labels >= 0).sum(-1).clamp(min=1)
        return torch.stack((means,))  # no view, of which FSDP warns


NEXT_TOKEN = NextToken()
