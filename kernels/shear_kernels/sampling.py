"""A few words of a teacher's distribution that stand for all of it, without bias: what a cache of a teacher keeps.

Random-sampling distillation (Anshumann et al., arXiv 2503.16870) draws words from p with replacement and gives each the
share of the draws it had, an unbiased estimate of p, where the most likely words alone are a biased one. Here words are
drawn without replacement, which is unbiased too and varies less: words that would be drawn more than once are taken for
sure with their own probability, and each of the others with a chance proportional to it, all with the same share.
"""

import torch
from torch import Tensor

from shear_kernels.cross_entropy import Reduce, _matmul

WHOLE = 65535  # shares are written as so many parts of 1
CHUNK_LOGITS = 2**22  # whose float64 probabilities exist at once: 32 MB each time


def sample(p: Tensor, count: int, point: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, shares), both [tokens, count]: words and what they stand for, such that the expectation over ``point`` of
    shares laid out over the vocabulary is p. p: [tokens, vocab], rows of sum 1; point: [tokens], uniform in [0, 1).

    The k most likely words have shares p; each other word is one of the ``count - k`` left with probability p / share,
    share = their sum / (count - k), k being the least for which none of these is above 1. Shares sum to 1; with
    ``count = vocab`` they are p. Systematic sampling (Madow 1949) with Horvitz-Thompson weights. float64.
    """
    p, point = p.double(), point.double()
    top, words = p.topk(count)
    places = torch.arange(count, device=p.device)
    tail = p.sum(-1, keepdim=True) - top.cumsum(-1) + top  # of each word and those less likely
    sure = (top * (count - places) >= tail).long().cumprod(-1).bool()
    k = sure.sum(-1, keepdim=True)
    rest = p.scatter(1, words, top.where(~sure, 0)).cumsum_(-1)
    share = rest[:, -1:] / (count - k).clamp(min=1)
    drawn = torch.searchsorted(rest, (places + point[:, None]) * share, right=True).clamp_(max=p.shape[1] - 1)
    drawn = drawn.gather(1, (places - k).clamp(min=0))
    return words.where(sure, drawn), top.where(sure, share)


def in_parts(shares: Tensor, point: Tensor) -> Tensor:
    """Shares [tokens, count] of sum 1 as whole numbers of sum ``WHOLE``, whose expectation over ``point`` [tokens],
    uniform in [0, 1), is the shares'. int64."""
    ends = (shares.cumsum(-1) * WHOLE + point[:, None]).floor().long().clamp_(max=WHOLE)
    ends[:, -1] = WHOLE
    return ends.diff(dim=-1, prepend=torch.zeros_like(ends[:, :1]))


def sample_teacher(
    x: Tensor,
    weight: Tensor,
    count: int,
    points: Tensor,
    temperature: float = 1.0,
    first: int = 0,
    vocab: int | None = None,
    all_reduce_sum: Reduce | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of p = softmax(x weight^T / temperature): ids [tokens, count], parts of ``WHOLE`` [tokens, count], and the sum of
    p log p [tokens], without making all logits at once. x: [tokens, hidden]; weight: [vocab_shard, hidden], rows from
    ``first`` on of a vocabulary of ``vocab`` words; points: [2, tokens], uniform in [0, 1), alike on all ranks.

    ``all_reduce_sum`` joins the shards of a chunk's logits. int64, int64, float32 (float64 for float64).
    """
    narrow, rows = weight.to(x.dtype), slice(first, first + weight.shape[0])
    vocab = vocab or weight.shape[0]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    chunk = chunk or max(1, CHUNK_LOGITS // vocab)
    for start in range(0, len(x), chunk):
        span = slice(start, start + chunk)
        logits = _matmul(x[span], narrow.t())
        if all_reduce_sum is not None:
            whole = logits.new_zeros(len(logits), vocab)
            whole[:, rows] = logits
            logits = all_reduce_sum(whole)
        log_p = logits.div_(temperature).log_softmax(-1)
        p = log_p.exp()
        ids, shares = sample(p / p.sum(-1, keepdim=True), count, points[0, span])
        found.append((ids, in_parts(shares, points[1, span].double()), torch.linalg.vecdot(p, log_p)))
    ids, parts, information = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return ids, parts, information
