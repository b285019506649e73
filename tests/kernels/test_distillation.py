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
@pytest.mark.parametrize(("chunk", "kept_bytes"), [(1, 2**20), (5, 0), (64, 2**20), (64, 0)])
def test_values_and_gradients_are_plain_pytorchs(temperature: float, chunk: int, kept_bytes: int) -> None:
    given, gains = subjects(), torch.randn(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = plain(*given, temperature)
    found = vocab_distillation(*given, temperature, chunk=chunk, kept_bytes=kept_bytes)
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


def test_in_16_bits_what_is_kept_is_as_good_as_what_is_made_again() -> None:
    """The derivatives are rounded once, as small as they are: a sure token's is no difference of rounded numbers."""
    x, weight, teacher_x, teacher_weight, labels = subjects()
    grads = []
    for kept_bytes in (2**20, 0):
        narrow, head = x.detach().bfloat16().requires_grad_(), weight.detach().float().mul(8).requires_grad_()
        given = narrow, head, teacher_x.bfloat16(), teacher_weight.float() * 8, labels
        entropy, apart = vocab_distillation(*given, kept_bytes=kept_bytes)
        grads.append(torch.autograd.grad((entropy + apart).sum(), (narrow, head)))
    for kept, again in zip(*grads, strict=True):
        torch.testing.assert_close(kept, again, atol=0.02 * float(again.abs().max()), rtol=0.02)
