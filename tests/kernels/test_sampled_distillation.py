"""Distillation from a few sampled probabilities: equal to the exact one with all of them, and to it in the mean.

A vocabulary in shards: tests/distributed/test_distillation.py.
"""

import pytest
import torch
from shear_kernels import sample_teacher, sampled_distillation, vocab_distillation
from shear_kernels.sampling import WHOLE, in_parts, sample
from test_distillation import TOKENS, VOCAB, subjects
from torch import Tensor

TEMPERATURE = 2.5


def teacher() -> tuple[Tensor, Tensor]:
    """p at the temperature, and the sum of p log p."""
    _, _, teacher_x, teacher_weight, _ = subjects()
    p = (teacher_x @ teacher_weight.T / TEMPERATURE).softmax(-1)
    return p, (p * p.log()).sum(-1)


def losses(ids: Tensor, shares: Tensor, chunk: int = 5, kept_bytes: int = 2**30) -> list[Tensor]:
    """Both losses, and the gradients of their sum."""
    x, weight, _, _, labels = subjects()
    given = ids, shares, teacher()[1], labels, TEMPERATURE
    found = sampled_distillation(x, weight, *given, chunk=chunk, kept_bytes=kept_bytes)
    return [*found, *torch.autograd.grad(sum(loss.sum() for loss in found), (x, weight))]


def exact() -> list[Tensor]:
    x, weight, teacher_x, teacher_weight, labels = subjects()
    found = vocab_distillation(x, weight, teacher_x, teacher_weight, labels, TEMPERATURE)
    return [*found, *torch.autograd.grad(sum(loss.sum() for loss in found), (x, weight))]


def test_all_probabilities_are_the_teacher() -> None:
    ids, shares = sample(teacher()[0], VOCAB, torch.rand(TOKENS))
    for kept_bytes in (2**30, 0):
        for found, expected in zip(losses(ids, shares, kept_bytes=kept_bytes), exact(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def laid(p: Tensor, points: Tensor, count: int) -> Tensor:
    """Estimates of p, one for each column of points [2, draws]: [draws, *p.shape]."""
    draws = points.shape[1]
    first, second = points.repeat_interleave(len(p), 1)
    ids, shares = sample(p.repeat(draws, 1), count, first)
    shares = in_parts(shares, second).double() / WHOLE
    return torch.zeros(draws * len(p), p.shape[1], dtype=p.dtype).scatter_add(1, ids, shares).view(draws, *p.shape)


@pytest.mark.parametrize("count", [1, 4, VOCAB - 1])
def test_the_mean_over_all_points_is_p(count: int) -> None:
    """Points on a grid of 4,000: what a word's mean misses is its share of one of them, at most."""
    p, draws = teacher()[0], 4000
    grid = (torch.arange(draws, dtype=p.dtype) + 0.5) / draws
    found = laid(p, torch.stack((grid, grid[torch.randperm(draws)])), count)
    assert (found.sum(-1) - 1).abs().max() < 1e-12
    assert ((found.mean(0) - p).abs() <= 2 * found.amax(0) / draws + 1 / WHOLE / draws**0.5).all()


def test_the_mean_loss_and_gradient_over_samplings_are_the_teachers() -> None:
    """Within five standard errors, every loss and every entry of the gradients."""
    p, draws, count = teacher()[0], 250, 4
    points = torch.rand(2, draws, TOKENS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    few = []
    for first, second in points.unbind(1):
        ids, shares = sample(p, count, first)
        few.append(losses(ids, in_parts(shares, second).double() / WHOLE))
    spread = 0.0
    for index, expected in enumerate(exact()):
        found = torch.stack([each[index].detach() for each in few])
        assert ((found.mean(0) - expected).abs() <= 5 * found.std(0) / draws**0.5 + 1e-9).all()
        spread = max(spread, float(found.std(0).max()))
    assert spread > 0.1  # and it is an estimate


def test_samples_vary_less_than_draws_with_replacement() -> None:
    p, count = teacher()[0], 4
    found = laid(p, torch.rand(2, 2000, generator=torch.Generator().manual_seed(3), dtype=p.dtype), count)
    with_replacement = p * (1 - p) / count  # variance of a share of the draws
    assert (found.var(0).sum(-1) < 0.9 * with_replacement.sum(-1)).all()


def test_what_a_teacher_is_sampled_to_does_not_depend_on_the_chunk() -> None:
    _, _, x, weight, _ = subjects()
    points = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    whole, chunked = (sample_teacher(x, weight, 4, points, TEMPERATURE, chunk=chunk) for chunk in (64, 3))
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b)
    assert (whole[1].sum(-1) == WHOLE).all()
    assert (whole[1] >= 0).all()
    torch.testing.assert_close(whole[2], teacher()[1])
