"""The fused distillation losses are plain PyTorch's: values and gradients to 1e-10 in float64.

A vocabulary in shards: tests/distributed/test_distillation.py.
"""

import pytest
import torch
from shear_kernels import vocab_distillation
from torch import Tensor
from torch.nn.functional import cross_entropy

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB = 13, 6, 9, 22


def subjects() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, teacher_x, teacher_weight = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (TOKENS, TEACHER_HIDDEN), (VOCAB, TEACHER_HIDDEN))
    )
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[[2, 7]] = -100
    return x.requires_grad_(), weight.requires_grad_(), teacher_x, teacher_weight, labels


def plain(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    s, t = x @ weight.T, teacher_x @ teacher_weight.T
    entropy = cross_entropy(s, labels, reduction="none")
    p = (t / temperature).softmax(-1)
    divergence = (p * (p.log() - (s / temperature).log_softmax(-1))).sum(-1) * temperature**2
    return entropy, divergence.where(labels >= 0, 0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_values_and_gradients_are_plain_pytorchs(temperature: float, chunk: int) -> None:
    given, gains = subjects(), torch.randn(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, found = plain(*given, temperature), vocab_distillation(*given, temperature, chunk=chunk)
    wanted = torch.autograd.grad(sum((g * e).sum() for g, e in zip(gains, expected, strict=True)), given[:2])
    got = torch.autograd.grad(sum((g * e).sum() for g, e in zip(gains, found, strict=True)), given[:2])
    for a, b in zip((*found, *got), (*expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert (found[1][given[4] >= 0] > 0).all()


def test_what_does_not_fit_is_named() -> None:
    x, weight, teacher_x, teacher_weight, labels = subjects()
    with pytest.raises(ValueError, match="use a teacher of the same tokens and vocabulary"):
        vocab_distillation(x, weight, teacher_x, teacher_weight[:-1], labels)
    with pytest.raises(ValueError, match="temperature=0"):
        vocab_distillation(x, weight, teacher_x, teacher_weight, labels, temperature=0)
