"""Cross entropy and divergence from a teacher in one op, so that neither model's [tokens, vocab] logits exist at once.

Both models' final states and heads come in; logits of a chunk of tokens are made, used and dropped, and made again in
the backward. The heads may be shards of the vocabulary; small all-reduces of [tokens] numbers join the shards.
"""

from typing import Any

import torch
from torch import Tensor

from shear_kernels.cross_entropy import Reduce, _matmul


def vocab_distillation(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    first: int = 0,
    all_reduce_max: Reduce | None = None,
    all_reduce_sum: Reduce | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(cross entropy, divergence) of every token, both [tokens], 0 where the label is negative.

    With s = x weight^T and t = teacher_x teacher_weight^T: ``logsumexp(s) - s[label]``, and ``temperature^2
    KL(softmax(t / temperature) || softmax(s / temperature))``, whose gradient does not shrink with the temperature.
    x: [tokens, hidden]; weight: [vocab_shard, hidden]; teacher_x, teacher_weight: alike with the teacher's hidden, the
    same rows of the same vocabulary. labels, first, all_reduce_max, all_reduce_sum: as for ``vocab_cross_entropy``.
    Returns float32 (float64 for float64), the same on all ranks.

    Gradients go to x (a partial sum over shards, which the caller reduces) and weight; the teacher gets none.
    Memory: 4 * chunk * vocab_shard * 4 bytes at the peak, apart from dweight.
    """
    if x.dim() != 2 or labels.shape != x.shape[:1] or weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)} do not fit; "
            "use [tokens, hidden], [vocab, hidden], [tokens]"
        )
    if teacher_x.shape[:1] != x.shape[:1] or teacher_weight.shape != (weight.shape[0], teacher_x.shape[1]):
        raise ValueError(
            f"teacher_x {tuple(teacher_x.shape)} and teacher_weight {tuple(teacher_weight.shape)} do not fit "
            f"{x.shape[0]} tokens and {weight.shape[0]} words; use a teacher of the same tokens and vocabulary"
        )
    if (all_reduce_max is None) != (all_reduce_sum is None):
        raise ValueError("all_reduce_max and all_reduce_sum belong together; give both or neither")
    if chunk < 1 or temperature <= 0:
        raise ValueError(f"chunk={chunk} must be 1 token or more, temperature={temperature} above 0")
    losses: tuple[Tensor, Tensor] = _VocabDistillation.apply(  # type: ignore[no-untyped-call]
        x, weight, teacher_x, teacher_weight, labels, temperature, first, all_reduce_max, all_reduce_sum, chunk
    )
    return losses


class _VocabDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        teacher_x: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        temperature: float,
        first: int,
        all_reduce_max: Reduce | None,
        all_reduce_sum: Reduce | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        narrow, teacher_narrow = weight.to(x.dtype), teacher_weight.to(teacher_x.dtype)
        row = labels - first  # this shard's row of each label, if 0 <= row < rows
        here = (row >= 0) & (row < weight.shape[0]) & (labels >= 0)
        row = row.where(here, 0)
        parts = []
        for start in range(0, x.shape[0], chunk):
            span = slice(start, start + chunk)
            s, t = _matmul(x[span], narrow.t()), _matmul(teacher_x[span], teacher_narrow.t()).to(_wide(x))
            top, teacher_top = s.amax(-1), t.amax(-1)
            label_logit = s.gather(1, row[span, None]).squeeze(1)
            weights = t.sub(teacher_top[:, None]).div_(temperature).exp_()  # of the teacher, not yet normalised
            gap = torch.linalg.vecdot(weights, t.sub_(s).div_(temperature))
            s.sub_(top[:, None])
            total, warm = s.exp().sum(-1), s.div_(temperature).exp_().sum(-1)
            parts.append(torch.stack((top, teacher_top, total, warm, weights.sum(-1), gap, label_logit)))
        if not parts:
            parts.append(x.new_empty(7, 0, dtype=_wide(x)))
        top, teacher_top, total, warm, teacher_total, gap, label_logit = torch.cat(parts, dim=1)
        label_logit = label_logit.where(here, 0)
        if all_reduce_max is not None and all_reduce_sum is not None:
            tops = all_reduce_max(torch.stack((top, teacher_top)))
            scale = (top - tops[0]).exp(), ((top - tops[0]) / temperature).exp()
            teacher_scale = ((teacher_top - tops[1]) / temperature).exp()
            sums = (total * scale[0], warm * scale[1], teacher_total * teacher_scale, gap * teacher_scale, label_logit)
            total, warm, teacher_total, gap, label_logit = all_reduce_sum(torch.stack(sums))
            top, teacher_top = tops
        log_sum = top + total.log()
        log_warm = top / temperature + warm.log()
        log_teacher = teacher_top / temperature + teacher_total.log()
        ctx.save_for_backward(
            x, weight, teacher_x, teacher_weight, labels, row, here, log_sum, log_warm, log_teacher
        )  # fmt: skip
        ctx.chunk, ctx.temperature = chunk, temperature
        divergence = temperature**2 * (gap / teacher_total - log_teacher + log_warm)
        return (log_sum - label_logit).where(labels >= 0, 0), divergence.where(labels >= 0, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_divergence: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, teacher_x, teacher_weight, labels, row, here, log_sum, log_warm, log_teacher = ctx.saved_tensors
        temperature = ctx.temperature
        need_x, need_weight = ctx.needs_input_grad[:2]
        narrow, teacher_narrow = weight.to(x.dtype), teacher_weight.to(teacher_x.dtype)
        grad, grad_divergence = grad.where(labels >= 0, 0), grad_divergence.where(labels >= 0, 0) * temperature
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=log_sum.dtype) if need_weight else None
        for start in range(0, x.shape[0], chunk := ctx.chunk):
            span = slice(start, start + chunk)
            s, t = _matmul(x[span], narrow.t()), _matmul(teacher_x[span], teacher_narrow.t()).to(_wide(x))
            p = s.sub(log_sum[span, None]).exp_()
            p.scatter_add_(1, row[span, None], -here[span, None].to(p.dtype))
            p.mul_(grad[span, None])
            gap = s.div_(temperature).sub_(log_warm[span, None]).exp_()
            gap.sub_(t.div_(temperature).sub_(log_teacher[span, None]).exp_())
            p = p.addcmul_(gap, grad_divergence[span, None]).to(x.dtype)
            if dx is not None:
                dx[span] = _matmul(p, narrow)
            if dweight is not None:
                dweight += _matmul(p.t(), x[span])
        return dx, None if dweight is None else dweight.to(weight.dtype), *[None] * 8


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
