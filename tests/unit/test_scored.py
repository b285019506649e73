"""Methods that keep the units of the largest score: exact counts on the way, scores as they are defined."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import CUT_KINDS, KINDS, sizes
from shear_tron.masks import Masks
from shear_tron.params import params
from shear_tron.pruning import scores as scores_module
from shear_tron.pruning.config import PruneConfig, TargetConfig
from shear_tron.pruning.make import make_method
from shear_tron.pruning.scored import Scored
from shear_tron.pruning.scores import chance, magnitude
from shear_tron.shape import Shape

SOURCE = Shape(hidden=12, layers=5, heads=12, kv_heads=4, head_dim=4, ffn=18, vocab=32)
TARGET = Shape(hidden=7, layers=3, heads=4, kv_heads=2, head_dim=4, ffn=8, vocab=32)


class Alone:
    """One rank that sees everything."""

    def gradient(self, tensors: Sequence[Tensor]) -> None: ...

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor


def random_gradients(seed: int, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {kind: torch.randn(size, generator=generator, dtype=torch.float64) for kind, size in sizes(SOURCE).items()}
        for _ in range(count)
    ]


def learn(method: Scored, step: int, gradients: list[dict[str, Tensor]]) -> None:
    method.learn(step, range(len(gradients)), len(gradients), [Masks()] * len(gradients), gradients, Alone())
    method.advance()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), warmup=st.integers(0, 9), balance=st.sampled_from([1, 2]))
def test_every_step_has_its_exact_counts_and_what_is_closed_stays_closed(seed: int, warmup: int, balance: int) -> None:
    method = Scored(Architecture(SOURCE), TARGET, warmup, 0.9, 1, balance, torch.float64)
    learn(method, -1, random_gradients(seed, 2))
    assert all(mask.all() for _, mask in method.decide_now().items())  # all open while scores are made
    method.close(0)
    before = method.decide_now()
    for step in range(11):
        now, target = method.sample(step, 0), sizes(TARGET)
        closed = 1 - (1 - min(1.0, step / warmup)) ** 3 if warmup else 1.0
        for kind, mask in now.items():
            parts = balance if kind in CUT_KINDS else 1
            each = mask.shape[-1] // parts
            kept = each - round((each - target[kind][-1] // parts) * closed)
            assert (mask.unflatten(-1, (parts, each)).sum(-1) == kept).all(), (step, kind)
            assert ((mask == 0) | (mask == 1)).all()
            assert (mask <= getattr(before, kind)).all()
        for kind, mask in method.decide().items():  # wherever a run stops, it stops at the target's counts
            assert (mask.sum(-1) == target[kind][-1]).all()
            assert (mask <= getattr(now, kind)).all()
        learn(method, step, random_gradients(seed + step, 2))
        before = now


def test_the_units_of_the_largest_scores_stay() -> None:
    method = Scored(Architecture(SOURCE), TARGET, 0, dtype=torch.float64)
    scores = chance(3, Architecture(SOURCE))
    method.set_scores(scores)
    method.close(0)
    for kind, mask in method.decide().items():
        kept = scores[kind].where(mask == 1, torch.inf).amin(-1)
        closed = scores[kind].where(mask == 0, -torch.inf).amax(-1)
        assert (kept > closed).all(), kind


def test_fisher_scores_are_means_of_squares_of_whole_gradients() -> None:
    """A plain mean over calibration, then a running mean a microbatch; gradients are of a share's mean loss."""
    method = Scored(Architecture(SOURCE), TARGET, 100, decay=0.9, calibration_batches=3, dtype=torch.float64)
    batches = [random_gradients(seed, 4) for seed in range(6)]
    for step, batch in enumerate(batches, -3):
        learn(method, step, batch)
    squares = [[(4 * microbatch["ffn"]) ** 2 for microbatch in batch] for batch in batches]
    expected = torch.stack([each for batch in squares[:3] for each in batch]).mean(0)
    for batch in squares[3:]:
        for each in batch:
            expected = 0.9 * expected + 0.1 * each
    still = method.scores["ffn"] >= 0
    assert 0 < still.sum() < still.numel()
    torch.testing.assert_close(method.scores["ffn"][still], expected[still], rtol=1e-12, atol=0)


def test_a_skipped_step_changes_nothing_and_broken_gradients_are_seen() -> None:
    method = Scored(Architecture(SOURCE), TARGET, 4, decay=0.9, dtype=torch.float64)
    before = {kind: scores.clone() for kind, scores in method.scores.items()}
    broken = random_gradients(0, 2)
    broken[1]["hidden"][3] = torch.nan
    method.learn(0, range(2), 2, [Masks()] * 2, broken, Alone())
    assert not method.is_finite()
    assert all(torch.equal(scores, before[kind]) for kind, scores in method.scores.items())


@pytest.mark.parametrize("piece", [30, 1 << 24])
def test_magnitude_by_hand(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    weights = {
        p.name: torch.randn(p.size, generator=generator, dtype=torch.float64) for p in params(Architecture(SOURCE))
    }
    scores = magnitude(weights.__getitem__, Architecture(SOURCE))
    square = {name: weight.square() for name, weight in weights.items()}
    layer = {leaf: square[f"layers.2.{leaf}"] for leaf in ("q", "k", "v", "o", "gate", "up", "down")}
    torch.testing.assert_close(scores["ffn"][2], layer["gate"].sum(1) + layer["up"].sum(1) + layer["down"].sum(0))
    torch.testing.assert_close(scores["layers"][2], sum(each.sum() for each in layer.values()))
    rows = slice(1 * 3 * 4, 2 * 3 * 4)  # of key-value group 1: its 3 query heads of 4 entries
    group = layer["q"][rows].sum() + layer["o"][:, rows].sum() + layer["k"][4:8].sum() + layer["v"][4:8].sum()
    torch.testing.assert_close(scores["kv_heads"][2, 1], group)
    places = [head * 4 + entry for head in (2, 5, 8, 11) for entry in range(4)]  # place 2 of each group
    place = layer["q"][places].sum() + layer["o"][:, places].sum()
    torch.testing.assert_close(scores["heads_per_group"][2, 2], place)
    columns = sum(each[:, 5].sum() for each in square.values() if each.dim() == 2 and each.shape[1] == 12)
    rows_of_o = sum(each[5].sum() for name, each in square.items() if name.endswith(("o", "down")))
    torch.testing.assert_close(scores["hidden"][5], columns + rows_of_o)


def test_chance_is_a_function_of_the_seed() -> None:
    first, again, other = (
        chance(5, Architecture(SOURCE)),
        chance(5, Architecture(SOURCE)),
        chance(6, Architecture(SOURCE)),
    )
    for kind in KINDS:
        assert torch.equal(first[kind], again[kind])
        assert not torch.equal(first[kind], other[kind])


@pytest.mark.parametrize("method", ["hard_concrete", "fisher", "magnitude", "activation", "random"])
def test_a_state_restores_the_masks(method: str) -> None:
    config = PruneConfig(target=TargetConfig(), method=method, warmup_steps=2)
    first, second = (make_method(config, Architecture(SOURCE), TARGET, seed=1) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for tensor in first.tensors().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    if isinstance(first, Scored):
        first.close(1)
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    for one, other in ((first.decide(), second.decide()), (first.sample(7, 3), second.sample(7, 3))):
        for kind, mask in one.items():
            assert torch.equal(mask, getattr(other, kind)), kind


def test_starts_that_choose_nothing_are_refused() -> None:
    target = TargetConfig(ffn=8)
    with pytest.raises(ValidationError, match="warmup_steps=0 closes gates before they could learn"):
        PruneConfig(target=target, warmup_steps=0)
    with pytest.raises(ValidationError, match="use calibration_batches of 1 or more"):
        PruneConfig(target=target, method="fisher", warmup_steps=0, calibration_batches=0)
