"""The loss with its exponentials by the kernel: as lawful as by plain PyTorch."""

from functools import partial

import pytest
import shear_kernels
import torch
from kernel_law import DEVICE, DTYPES, assert_lawful, normal
from shear_kernels import cross_entropy, exponentials, vocab_cross_entropy


@pytest.mark.parametrize("kept_bytes", [0, 2**31])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [37, exponentials.BLOCK + 5])
def test_loss_is_reference(vocab: int, dtype: torch.dtype, kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shear_kernels, "vocab_cross_entropy", partial(vocab_cross_entropy, kept_bytes=kept_bytes))
    labels = torch.randint(0, vocab, (13,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels[::4] = -100
    tensors = {"x": normal(13, 24, seed=1, dtype=dtype), "weight": normal(vocab, 24, seed=2, dtype=dtype)}
    assert_lawful("vocab_cross_entropy", {n: 0.5 * t for n, t in tensors.items()}, labels=labels)


@pytest.mark.parametrize("columns", [1, 37, 2 * exponentials.BLOCK + 3])
def test_exponentials_are_plain_pytorchs(columns: int) -> None:
    """Far from 0 and one row of equal logits, too; the label's term is 0, and -1 is no label."""
    logits = normal(4, columns, seed=1) * 30
    logits[2], label = 1e4, torch.tensor([0, -1, columns - 1, columns // 2], device=DEVICE)
    top, total, terms = exponentials.exponentials(logits, label, torch.float32)
    plain = cross_entropy._exponentials(logits.clone(), label, torch.float32, kernels=False)
    for mine, theirs in zip((top, total, terms), plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(exponentials.exponentials(logits, label, None)[1], total)
