"""LM head and cross entropy in one op, so that the float32 [tokens, vocab] logits never exist at once.

At 16,384 tokens and Llama-3's 128,256 words those logits and their gradient are 16.8 GB; a chunk of them is 0.5. The
forward leaves the softmax's terms for the backward in x's dtype, where they fit (2 bytes per logit), so that three
matrix products do; else the backward computes each chunk's logits again, a fourth product instead of the memory. The
head may be a shard of the vocabulary; two small all-reduces of [tokens] numbers join the shards.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]

CHUNK_LOGITS = 2**27  # of a chunk, by default: 0.5 GB in float32, 4096 tokens of LLaMA's 32,000 words
KEPT_BYTES = 2**31  # of the terms that a forward may leave for its backward


def vocab_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int = 0,
    all_reduce_max: Reduce | None = None,
    all_reduce_sum: Reduce | None = None,
    chunk: int | None = None,
    kept_bytes: int = KEPT_BYTES,
    kernels: bool = False,
) -> Tensor:
    """``logsumexp(x weight^T) - (x weight^T)[label]`` for every token, 0 where the label is negative.

    x: [tokens, hidden]; weight: [vocab_shard, hidden]; labels: [tokens] int64, ids in the whole vocabulary, negative
    where the token does not count. ``first`` is the id of the shard's first row. ``all_reduce_max`` and
    ``all_reduce_sum`` reduce a tensor over the ranks that hold the other shards (in place or not) and return it; both
    None when ``weight`` is the whole head. ``chunk``: tokens whose logits exist at once (default: 2^27 logits);
    ``kept_bytes``: what the forward may leave for the backward; ``kernels``: Triton for the exponentials. Returns
    [tokens], the same on all ranks, in float32 (float64 for float64).

    Gradients: with p = softmax - onehot(label), ``dx = (g p) weight`` over this rank's rows only, a partial sum that
    the caller reduces over the shards, and ``dweight = p^T (g x)``, summed over chunks in float32. A label's own entry
    of p is kept in float32: for a sure token it is a small difference of large numbers.
    Memory: chunk * vocab_shard * 4 bytes at the peak and what is kept, apart from dweight. 2 (forward) + 4 (backward,
    6 where nothing is kept) * tokens * vocab_shard * hidden FLOPs.
    """
    require_fit(x, weight, labels, all_reduce_max, all_reduce_sum)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token; the default is 2^27 / vocab")
    readable = labels.device.type == "cpu" and not torch.compiler.is_compiling()  # on a GPU this would wait
    if all_reduce_sum is None and readable and labels.numel():
        largest, end = int(labels.max()), first + weight.shape[0]
        if largest >= end:
            raise ValueError(f"label {largest} is outside the vocabulary of {end}; labels must be below it")
    chunk = chunk or max(1, CHUNK_LOGITS // max(1, weight.shape[0]))
    keep = torch.is_grad_enabled() and x.shape[0] * weight.shape[0] * x.element_size() <= kept_bytes
    loss: Tensor = _VocabCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, labels, first, all_reduce_max, all_reduce_sum, chunk, keep, kernels
    )
    return loss


def require_fit(
    x: Tensor, weight: Tensor, labels: Tensor, all_reduce_max: Reduce | None, all_reduce_sum: Reduce | None
) -> None:
    """ValueError unless these are [tokens, hidden], [vocab, hidden], [tokens], and both or neither reduction."""
    if x.dim() != 2 or labels.shape != x.shape[:1] or weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)} do not fit; "
            "use [tokens, hidden], [vocab, hidden], [tokens]"
        )
    if (all_reduce_max is None) != (all_reduce_sum is None):
        raise ValueError("all_reduce_max and all_reduce_sum belong together; give both or neither")


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with the result in float32 (float64 for float64); on CUDA it is never rounded to 16 bits on the way."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
    return a @ b


def _exponentials(logits: Tensor, label: Tensor, dtype: torch.dtype | None, kernels: bool) -> tuple[Tensor, ...]:
    """(maximum of each row, terms ``exp(logits - maximum)`` summed, terms in ``dtype`` with 0 at the label or nothing).
    ``logits`` may be overwritten; label: a column, or -1."""
    if kernels:
        from shear_kernels.exponentials import exponentials

        found: tuple[Tensor, ...] = exponentials(logits, label, dtype)
        return found
    top = logits.amax(-1)
    terms = logits.sub_(top[:, None]).exp_()
    total = terms.sum(-1)
    return top, total, terms if dtype is None else _without(terms, label).to(dtype)


def _without(terms: Tensor, label: Tensor) -> Tensor:
    """``terms`` with 0 at each row's label, in place; -1 for none."""
    kept = terms.gather(1, label.clamp(min=0)[:, None]) * (label < 0)[:, None]
    return terms.scatter_(1, label.clamp(min=0)[:, None], kept)


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
        keep: bool,
        kernels: bool,
    ) -> Tensor:
        narrow = weight.to(x.dtype)
        row = labels - first  # this shard's row of each label, -1 where another shard has it or none
        row = row.where((row >= 0) & (row < weight.shape[0]) & (labels >= 0), -1)

        parts, kept = [], []
        for start in range(0, x.shape[0], chunk):
            span = slice(start, start + chunk)
            logits = _matmul(x[span], narrow.t())
            label_logit = logits.gather(1, row[span].clamp(min=0)[:, None]).squeeze(1)
            top, total, terms = _exponentials(logits, row[span], x.dtype if keep else None, kernels)
            parts.append(torch.stack((top, total, label_logit)))
            kept.append(terms)
        if not parts:
            parts.append(x.new_empty(3, 0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32))
        own_top, total, label_logit = torch.cat(parts, dim=1)
        top, label_logit = own_top, label_logit.where(row >= 0, 0)
        own_label_logit = label_logit
        if all_reduce_max is not None and all_reduce_sum is not None:
            top = all_reduce_max(own_top.clone())
            total, label_logit = all_reduce_sum(torch.stack((total * (own_top - top).exp(), label_logit)))
        log_sum = top + total.log()

        # per token: what turns kept terms into probabilities, and the label's probability less one
        to_probability = (own_top - log_sum).exp()
        label_p = torch.expm1(own_label_logit - log_sum).where(row >= 0, 0)
        ctx.save_for_backward(x, weight, labels, row, log_sum, to_probability, label_p, *(kept if keep else ()))
        ctx.chunk = chunk
        loss: Tensor = (log_sum - label_logit).where(labels >= 0, 0)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, row, log_sum, to_probability, label_p, *kept = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        narrow = weight.to(x.dtype)
        grad = grad.where(labels >= 0, 0)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=log_sum.dtype) if need_weight else None
        for at, start in enumerate(range(0, x.shape[0], chunk := ctx.chunk)):
            span = slice(start, start + chunk)
            if kept:
                terms, factor = kept[at], (grad[span] * to_probability[span])[:, None]
            else:
                p = _matmul(x[span], narrow.t()).sub_(log_sum[span, None]).exp_()
                terms, factor = _without(p, row[span]).to(x.dtype), grad[span, None]
            label, own = row[span].clamp(min=0), (grad[span] * label_p[span])[:, None]
            if dx is not None:
                dx[span] = _matmul(terms, narrow) * factor + own * narrow[label]
            if dweight is not None:
                dweight += _matmul(terms.t(), (x[span] * factor).to(x.dtype))
                dweight.index_add_(0, label, (x[span] * own).to(dweight.dtype))
        return dx, None if dweight is None else dweight.to(weight.dtype), *(None,) * 7
