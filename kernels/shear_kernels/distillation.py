"""Cross entropy and divergence from a teacher in one op: no model's [tokens, vocab] float32 logits exist at once.

The student's final states and head come in, and of the teacher either the same, or a few sampled probabilities of every
token. Logits of a chunk of tokens are made, used and dropped; what they leave for the backward, where it fits, is the
two losses' derivatives in x's dtype. The heads may be shards of the vocabulary; small all-reduces join the shards.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shear_kernels.cross_entropy import KEPT_BYTES, Reduce, _matmul, require_fit

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**25}  # of a chunk, by default: 262 or 1,049 tokens of LLaMA's 32,000 words


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
    chunk: int | None = None,
    kept_bytes: int = KEPT_BYTES,
) -> tuple[Tensor, Tensor]:
    """(cross entropy, divergence) of every token, both [tokens], 0 where the label is negative.

    With s = x weight^T and t = teacher_x teacher_weight^T: ``logsumexp(s) - s[label]``, and ``temperature^2
    KL(softmax(t / temperature) || softmax(s / temperature))``, whose gradient does not shrink with the temperature.
    x: [tokens, hidden]; weight: [vocab_shard, hidden]; teacher_x, teacher_weight: alike with the teacher's hidden, the
    same rows of the same vocabulary. labels, first, all_reduce_max, all_reduce_sum, kept_bytes: as for
    ``vocab_cross_entropy``. Returns float32 (float64 for float64), the same on all ranks.

    Gradients go to x (a partial sum over shards, which the caller reduces) and weight; the teacher gets none.
    Memory: 6 * chunk * vocab_shard * 4 bytes at the peak and what is kept, 2 * tokens * vocab_shard in x's dtype, apart
    from dweight. chunk: tokens, by default those of 2^23 logits (CUDA: 2^25).
    """
    if teacher_x.shape[:1] != x.shape[:1] or teacher_weight.shape != (weight.shape[0], *teacher_x.shape[1:]):
        raise ValueError(
            f"teacher_x {tuple(teacher_x.shape)} and teacher_weight {tuple(teacher_weight.shape)} do not fit "
            f"{x.shape[0]} tokens and {weight.shape[0]} words; use a teacher of the same tokens and vocabulary"
        )
    teacher = _States(teacher_x, teacher_weight.to(teacher_x.dtype), temperature)
    shard = Shard(first, weight.shape[0], all_reduce_max, all_reduce_sum)
    return _distillation(x, weight, teacher, labels, temperature, shard, chunk, kept_bytes)


def sampled_distillation(
    x: Tensor,
    weight: Tensor,
    ids: Tensor,
    shares: Tensor,
    information: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    first: int = 0,
    all_reduce_max: Reduce | None = None,
    all_reduce_sum: Reduce | None = None,
    chunk: int | None = None,
    kept_bytes: int = KEPT_BYTES,
) -> tuple[Tensor, Tensor]:
    """``vocab_distillation`` from a sparse estimate of the teacher's distribution p at ``temperature``.

    ids: [tokens, samples] int64, words of the whole vocabulary; shares: [tokens, samples], their estimated
    probabilities, of sum 1; information: [tokens], the sum of p log p. The divergence is ``temperature^2 (information -
    sum of shares * log softmax(s / temperature)[ids])``: linear in shares, so where their expectation is p, that of the
    divergence and of its gradient are those of ``vocab_distillation``; with all of p they are equal. A single token's
    may be negative. All else as there.
    """
    if ids.shape != shares.shape or ids.shape[:1] != x.shape[:1] or information.shape != x.shape[:1]:
        raise ValueError(
            f"ids {tuple(ids.shape)}, shares {tuple(shares.shape)}, information {tuple(information.shape)} do not fit "
            f"{x.shape[0]} tokens; use [tokens, samples] twice and [tokens]"
        )
    shard = Shard(first, weight.shape[0], all_reduce_max, all_reduce_sum)
    teacher = _Samples(ids, shares, information, shard)
    return _distillation(x, weight, teacher, labels, temperature, shard, chunk, kept_bytes)


@dataclass(frozen=True)
class Shard:
    """Rows ``first`` to ``first + rows`` of a vocabulary, and how to reduce over the ranks that hold the others."""

    first: int
    rows: int
    all_reduce_max: Reduce | None = None
    all_reduce_sum: Reduce | None = None

    def row(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """(this shard's row of each word, or 0 where another shard has it or it is negative; whether it is here)"""
        row = words - self.first
        here = (row >= 0) & (row < self.rows) & (words >= 0)
        return row.where(here, 0), here

    def sum(self, values: Tensor) -> Tensor:
        return values if self.all_reduce_sum is None else self.all_reduce_sum(values)

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Over the vocabulary of all shards. [tokens, rows]"""
        found = logits.log_softmax(-1)
        if self.all_reduce_max is None:
            return found
        own = logits.amax(-1) - found.amax(-1)  # this shard's logsumexp
        top = self.all_reduce_max(own.clone())
        return found.add_((own - top - self.sum((own - top).exp()).log())[:, None])


class _Teacher(Protocol):
    def of(self, span: slice, wide: torch.dtype, shard: Shard) -> tuple[Tensor, Tensor]:
        """Of a chunk of tokens: probabilities [chunk, rows], fresh; this shard's part of the sum of p log p [chunk]."""
        ...


@dataclass(frozen=True)
class _States:
    x: Tensor
    weight: Tensor
    temperature: float

    def of(self, span: slice, wide: torch.dtype, shard: Shard) -> tuple[Tensor, Tensor]:
        logits = _matmul(self.x[span], self.weight.t()).to(wide)
        log_p = shard.log_softmax(logits if self.temperature == 1 else logits.div_(self.temperature))
        del logits
        p = log_p.exp()
        return p, torch.linalg.vecdot(p, log_p)


@dataclass(frozen=True)
class _Samples:
    ids: Tensor
    shares: Tensor
    information: Tensor
    shard: Shard

    def of(self, span: slice, wide: torch.dtype, shard: Shard) -> tuple[Tensor, Tensor]:
        row, here = shard.row(self.ids[span])
        p = torch.zeros(len(row), shard.rows, dtype=wide, device=row.device)
        p.scatter_add_(1, row, self.shares[span].to(wide) * here)
        first = 1.0 if shard.first == 0 else 0.0  # one shard's part is all
        return p, self.information[span].to(wide) * first


def _distillation(
    x: Tensor,
    weight: Tensor,
    teacher: _Teacher,
    labels: Tensor,
    temperature: float,
    shard: Shard,
    chunk: int | None,
    kept_bytes: int,
) -> tuple[Tensor, Tensor]:
    require_fit(x, weight, labels, shard.all_reduce_max, shard.all_reduce_sum)
    if chunk is None:
        chunk = max(1, CHUNK_LOGITS["cuda" if x.is_cuda else "cpu"] // max(1, shard.rows))
    if chunk < 1 or temperature <= 0:
        raise ValueError(f"chunk={chunk} must be 1 token or more, temperature={temperature} above 0")
    keep = torch.is_grad_enabled() and 2 * x.shape[0] * shard.rows * x.element_size() <= kept_bytes
    losses: tuple[Tensor, Tensor] = _Distillation.apply(  # type: ignore[no-untyped-call]
        x, weight, teacher, labels, temperature, shard, chunk, keep
    )
    return losses


def _of_chunk(
    span: slice, x: Tensor, weight: Tensor, teacher: _Teacher, labels: Tensor, temperature: float, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk of tokens: both losses [2, chunk], and their derivatives by the logits, [chunk, rows] each, the second
    over ``temperature``."""
    s = _matmul(x[span], weight.t())
    p, information = teacher.of(span, s.dtype, shard)
    row, here = shard.row(labels[span])
    log_q = shard.log_softmax(s)
    log_label = log_q.gather(1, row[:, None]).squeeze(1).where(here, 0)
    q = log_q.exp()
    by_entropy = q
    if temperature != 1:
        log_q = shard.log_softmax(s.div_(temperature))
        q = log_q.exp()
    del s
    gap = information - torch.linalg.vecdot(p, log_q)
    log_label, divergence = shard.sum(torch.stack((log_label, gap)))
    by_divergence = torch.sub(q, p, out=p)
    by_entropy.scatter_add_(1, row[:, None], -here[:, None].to(q.dtype))
    return torch.stack((-log_label, divergence * temperature**2)), by_entropy, by_divergence


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        teacher: _Teacher,
        labels: Tensor,
        temperature: float,
        shard: Shard,
        chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        narrow = weight.to(x.dtype)
        losses = torch.zeros(2, len(x), dtype=_wide(x), device=x.device)
        kept = []
        for start in range(0, len(x), chunk):
            span = slice(start, start + chunk)
            losses[:, span], *by = _of_chunk(span, x, narrow, teacher, labels, temperature, shard)
            kept += [each.to(x.dtype) for each in by] if keep else []
        ctx.save_for_backward(x, weight, labels, *kept)
        ctx.rest = None if keep else teacher, temperature, shard, chunk
        entropy, divergence = losses.where(labels >= 0, 0)
        return entropy, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, *kept = ctx.saved_tensors
        teacher, temperature, shard, chunk = ctx.rest
        need_x, need_weight = ctx.needs_input_grad[:2]
        narrow = weight.to(x.dtype)
        gains = [grad.where(labels >= 0, 0)[:, None] for grad in (grads[0], grads[1] * temperature)]
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=_wide(x)) if need_weight else None
        for at, start in enumerate(range(0, len(x), chunk)):
            span = slice(start, start + chunk)
            if kept:
                by_entropy, by_divergence = kept[2 * at : 2 * at + 2]
            else:
                _, by_entropy, by_divergence = _of_chunk(span, x, narrow, teacher, labels, temperature, shard)
            by = (by_entropy * gains[0][span]).addcmul_(by_divergence, gains[1][span]).to(x.dtype)
            if dx is not None:
                dx[span] = _matmul(by, narrow)
            if dweight is not None and dweight.dtype == by.dtype:
                dweight.addmm_(by.t(), x[span])  # a product of its own would be as large as dweight, for every chunk
            elif dweight is not None:
                dweight += _matmul(by.t(), x[span])
        return dx, None if dweight is None else dweight.to(weight.dtype), *[None] * 6


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
