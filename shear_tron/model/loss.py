"""Next-token cross entropy."""

import shear_kernels
from torch import Tensor

from shear_tron.model.split import Split


def next_token_loss(x: Tensor, head: Tensor, labels: Tensor, split: Split) -> Tensor:
    """Mean loss of each sequence, in nats a token.

    x: [tokens, hidden], the final norm's output for all tokens; head: [vocab (this rank's part), hidden];
    labels: [batch, time] int64, negative where there is nothing to predict. Returns [batch] float32 (float64 for a
    float64 model); a sequence without labels has loss 0.
    """
    loss = shear_kernels.vocab_cross_entropy(
        x,
        head,
        labels.flatten(),
        first=split.rank * head.shape[0],
        all_reduce_max=split.all_reduce_max,
        all_reduce_sum=split.all_reduce_sum,
    )
    return loss.view_as(labels).sum(-1) / (labels >= 0).sum(-1).clamp(min=1)
