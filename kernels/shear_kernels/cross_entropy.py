"""LM head and cross entropy in one op, so that the [tokens, vocab] logits never exist at once.

At 16,384 tokens and Llama-3's 128,256 words the float32 logits and their gradient are 16.8 GB; in chunks of 1,024
tokens they are 1.05 GB. The backward computes each chunk's logits again: one more matrix product instead of the memory.
The head may be a shard of the vocabulary; two small all-reduces of [tokens] numbers join the shards.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def vocab_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int = 0,
    all_reduce_max: Reduce | None = None,
    all_reduce_sum: Reduce | None = None,
    chunk: int = 1024,
) -> Tensor:
    """``logsumexp(x weight^T) - (x weight^T)[label]`` for every token, 0 where the label is negative.

    x: [tokens, hidden]; weight: [vocab_shard, hidden]; labels: [tokens] int64, ids in the whole vocabulary, negative
    where the token does not count. ``first`` is the id of the shard's first row. ``all_reduce_max`` and
    ``all_reduce_sum`` reduce a tensor over the ranks that hold the other shards (in place or not) and return it; both
    None when ``weight`` is the whole head. Returns [tokens], the same on all ranks, in float32 (float64 for float64).

    Gradients: with p = softmax - onehot(label), ``dx = (g p) weight`` over this rank's rows only, a partial sum that
    the caller reduces over the shards, and ``dweight = (g p)^T x``, summed over chunks in float32.
    Memory: 2 * chunk * vocab_shard * 4 bytes at the peak, apart from dweight. Reads x and weight once forward and twice
    backward per chunk; 2 (forward) + 6 (backward) * tokens * vocab_shard * hidden FLOPs.
    """
    if x.dim() != 2 or labels.shape != x.shape[:1] or weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)} do not fit; "
            "use [tokens, hidden], [vocab, hidden], [tokens]"
        )
    if (all_reduce_max is None) != (all_reduce_sum is None):
        raise ValueError("all_reduce_max and all_reduce_sum belong together; give both or neither")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token; the default is 1024")
    if all_reduce_sum is None and labels.device.type == "cpu" and labels.numel():  # on a GPU this would wait
        largest, end = int(labels.max()), first + weight.shape[0]
        if largest >= end:
            raise ValueError(f"label {largest} is outside the vocabulary of {end}; labels must be below it")
    loss: Tensor = _VocabCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, labels, first, all_reduce_max, all_reduce_sum, chunk
    )
    return loss


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with the result in float32 (float64 for float64); on CUDA it is never rounded to 16 bits on the way."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
    return a @ b


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        first: int,
        all_reduce_max: Reduce | None,
        all_reduce_sum: Reduce | None,
        chunk: int,
    ) -> Tensor:
        narrow = weight.to(x.dtype)
        row = labels - first  # this shard's row of each label, if 0 <= row < rows
        here = (row >= 0) & (row < weight.shape[0]) & (labels >= 0)
        row = row.where(here, 0)

        parts = []
        for start in range(0, x.shape[0], chunk):
            logits = _matmul(x[start : start + chunk], narrow.t())
            top = logits.amax(-1)
            label_logit = logits.gather(1, row[start : start + chunk, None]).squeeze(1)
            parts.append(torch.stack((top, logits.sub_(top[:, None]).exp_().sum(-1), label_logit)))
        if not parts:
            parts.append(x.new_empty(3, 0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32))
        top, total, label_logit = torch.cat(parts, dim=1)
        label_logit = label_logit.where(here, 0)
        if all_reduce_max is not None and all_reduce_sum is not None:
            top_of_all = all_reduce_max(top.clone())
            total, label_logit = all_reduce_sum(torch.stack((total * (top - top_of_all).exp(), label_logit)))
            top = top_of_all
        log_sum = top + total.log()

        ctx.save_for_backward(x, weight, labels, row, here, log_sum)
        ctx.chunk = chunk
        loss: Tensor = (log_sum - label_logit).where(labels >= 0, 0)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, row, here, log_sum = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        narrow = weight.to(x.dtype)
        grad = grad.where(labels >= 0, 0)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=log_sum.dtype) if need_weight else None
        for start in range(0, x.shape[0], chunk := ctx.chunk):
            span = slice(start, start + chunk)
            p = _matmul(x[span], narrow.t()).sub_(log_sum[span, None]).exp_()
            p.scatter_add_(1, row[span, None], -here[span, None].to(p.dtype))
            p = p.mul_(grad[span, None]).to(x.dtype)
            if dx is not None:
                dx[span] = _matmul(p, narrow)
            if dweight is not None:
                dweight += _matmul(p.t(), x[span])
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None, None, None, None
