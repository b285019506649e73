"""The fused head and loss equals the plain one, whole or in vocabulary shards."""

import threading
from collections.abc import Callable

import pytest
import torch
from shear_kernels import reference, vocab_cross_entropy
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::4] = -100
    return x, weight, labels


def all_of(op: Callable[..., Tensor], x: Tensor, weight: Tensor, labels: Tensor, **options: object) -> list[Tensor]:
    """Loss, dx and dweight under an upstream gradient that differs by token."""
    loss = op(x, weight, labels, **options)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype)
    return [loss, *torch.autograd.grad(loss, (x, weight), upstream)]


@pytest.mark.parametrize("kept_bytes", [0, 2**31])
@pytest.mark.parametrize("chunk", [1, 7, 8, None])
@pytest.mark.parametrize("tokens", [1, 21])
def test_equals_reference_in_float64(tokens: int, chunk: int | None, kept_bytes: int) -> None:
    """Whether the backward finds the forward's terms or computes them again."""
    x, weight, labels = inputs(tokens, 12, 37, torch.float64)
    for ours, wanted in zip(
        all_of(vocab_cross_entropy, x, weight, labels, chunk=chunk, kept_bytes=kept_bytes),
        all_of(reference.vocab_cross_entropy, x, weight, labels),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    x, weight, labels = inputs(5, 4, 9, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: vocab_cross_entropy(a, b, labels, chunk=2), (x, weight))


@pytest.mark.parametrize("kept_bytes", [0, 2**31])
@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_plain_pytorch(
    dtype: torch.dtype, sure: bool, kept_bytes: int
) -> None:
    """Sure tokens, whose label has nearly all the probability, too: their gradient is a small difference."""
    x, weight, labels = inputs(33, 64, 101, dtype)
    if sure:
        x = (0.1 * weight.detach().float()[labels.clamp(min=0)] + 0.1 * x.detach()).to(dtype).requires_grad_()
    exact = all_of(
        reference.vocab_cross_entropy,
        x.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        labels,
    )

    def plain(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((a @ b.t()).float(), c, reduction="none", ignore_index=-100)

    for ours, theirs, truth in zip(
        all_of(vocab_cross_entropy, x, weight, labels, chunk=8, kept_bytes=kept_bytes),
        all_of(plain, x, weight, labels),
        exact,
        strict=True,
    ):
        assert ours.dtype == theirs.dtype
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6


class Ranks:
    """All-reduces between threads, one a rank, as a tensor-parallel group would do them."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=20)
        self.slots: list[Tensor] = [torch.empty(0)] * count

    def reducer(self, rank: int, how: str) -> Callable[[Tensor], Tensor]:
        def reduce(tensor: Tensor) -> Tensor:
            self.slots[rank] = tensor.clone()
            self.barrier.wait()
            stacked = torch.stack(self.slots)
            self.barrier.wait()
            return tensor.copy_(stacked.amax(0) if how == "max" else stacked.sum(0))

        return reduce


@pytest.mark.parametrize("kept_bytes", [0, 2**31])
@pytest.mark.parametrize("ends", [(20, 40), (1, 39, 40), (13, 26, 40)])
def test_vocabulary_shards_join_to_the_whole(ends: tuple[int, ...], kept_bytes: int) -> None:
    x, weight, labels = inputs(17, 6, ends[-1], torch.float64)
    loss, dx, dweight = all_of(reference.vocab_cross_entropy, x, weight, labels)
    ranks, starts = Ranks(len(ends)), (0, *ends[:-1])
    results: list[list[Tensor]] = [[] for _ in ends]

    def run(rank: int) -> None:
        shard = weight.detach()[starts[rank] : ends[rank]].clone().requires_grad_()
        results[rank] = all_of(
            vocab_cross_entropy,
            x.detach().clone().requires_grad_(),
            shard,
            labels,
            first=starts[rank],
            all_reduce_max=ranks.reducer(rank, "max"),
            all_reduce_sum=ranks.reducer(rank, "sum"),
            chunk=5,
            kept_bytes=kept_bytes,
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ends))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    for result in results:
        torch.testing.assert_close(result[0], loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(result[1] for result in results), dx, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), dweight, rtol=0, atol=1e-12)


def test_large_logits_do_not_overflow_and_ignored_tokens_are_silent() -> None:
    x, weight, labels = inputs(8, 16, 32, torch.float32)
    x = (x.detach() * 1e4).requires_grad_()
    loss, dx, dweight = all_of(vocab_cross_entropy, x, weight, labels)
    assert all(torch.isfinite(t).all() for t in (loss, dx, dweight))
    assert not loss[labels < 0].any()
    assert not dx[labels < 0].any()
    assert dx[labels >= 0].any()


def test_no_tokens() -> None:
    x, weight, labels = inputs(0, 4, 8, torch.float32)
    loss, dx, dweight = all_of(vocab_cross_entropy, x, weight, labels)
    assert loss.shape == (0,)
    assert dx.shape == (0, 4)
    assert not dweight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([1, 2])}, "do not fit"),
        ({"labels": torch.tensor([1, 2, 99])}, "label 99 is outside the vocabulary of 8"),
        ({"chunk": 0}, "chunk=0"),
        ({"all_reduce_sum": lambda t: t}, "belong together"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(3, 4),
        "weight": torch.zeros(8, 4),
        "labels": torch.zeros(3).long(),
    }
    with pytest.raises(ValueError, match=message):
        vocab_cross_entropy(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(("kept_bytes", "products"), [(2**31, 3), (0, 4)])
def test_what_is_kept_is_not_computed_again(kept_bytes: int, products: int) -> None:
    x, weight, labels = inputs(21, 12, 37, torch.float32)
    with FlopCounterMode(display=False) as counter:
        vocab_cross_entropy(x, weight, labels, chunk=8, kept_bytes=kept_bytes).sum().backward()
    assert counter.get_total_flops() == products * 2 * 21 * 12 * 37
