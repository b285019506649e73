"""Hard-concrete gates: the released implementation's numbers, and laws for any logits and any noise."""

import json
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shear_tron.dims import KINDS, sizes
from shear_tron.pruning.gates import LIMIT, STRETCH, TEMPERATURE, Gates, uniform
from shear_tron.shape import Shape

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "hard_concrete.json").read_text())
ORIGINAL = {"hidden": "hidden", "layers": "layer", "kv_heads": "head", "ffn": "intermediate"}  # ours -> the original's
MULTI_HEAD = Shape(hidden=64, layers=4, heads=8, kv_heads=8, head_dim=8, ffn=96, vocab=32)
MULTI_HEAD_TARGET = Shape(hidden=32, layers=3, heads=4, kv_heads=4, head_dim=8, ffn=48, vocab=32)
GROUPED = Shape(hidden=12, layers=5, heads=12, kv_heads=4, head_dim=4, ffn=17, vocab=32)
GROUPED_TARGET = Shape(hidden=7, layers=3, heads=4, kv_heads=2, head_dim=4, ffn=9, vocab=32)
TOLERANCE = (
    1e-6  # the vectors are float32 results of order 1: off by up to some 1e-7 themselves, so compared absolutely
)


def original_gates() -> Gates:
    """Float64 gates at the vectors' logits, clamped as the original clamps them before use."""
    gates = Gates(MULTI_HEAD, MULTI_HEAD_TARGET, dtype=torch.float64)
    state = {kind: torch.tensor(VECTORS["loga"][name], dtype=torch.float64) for kind, name in ORIGINAL.items()}
    gates.load_state_dict(state)
    gates.clamp_()
    return gates


def random_logits(gates: Gates, seed: int, levels: int) -> None:
    """Logits on few ``levels`` have many ties; levels=1 is all equal, as at the start."""
    generator = torch.Generator().manual_seed(seed)
    for logits in gates.logits.values():
        drawn = torch.randint(levels, logits.shape, generator=generator) / max(levels - 1, 1)
        logits.data.copy_(LIMIT * (2 * drawn - 1))


@pytest.mark.parametrize("kind", ORIGINAL)
def test_sample_reproduces_the_released_code(kind: str) -> None:
    gates = original_gates()
    noise = {ours: torch.tensor(VECTORS["sample"][name]["eps"]).double() for ours, name in ORIGINAL.items()}
    expected = torch.tensor(VECTORS["sample"][ORIGINAL[kind]]["z"]).double()
    mask = getattr(gates.sample_from(noise), kind)
    torch.testing.assert_close(mask, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(mask == 0, expected == 0)
    assert torch.equal(mask == 1, expected == 1)


@pytest.mark.parametrize("which", ["deterministic_target", "deterministic_current"])
@pytest.mark.parametrize("kind", ORIGINAL)
def test_decided_masks_reproduce_the_released_code(kind: str, which: str) -> None:
    gates = original_gates()
    masks = gates.decide() if which == "deterministic_target" else gates.decide_expected()
    mask = getattr(masks, kind)
    for name in ("mlp", "head_layer") if kind == "layers" else (ORIGINAL[kind],):
        expected = torch.tensor(VECTORS[which][f"{name}_z"]).double().reshape(mask.shape)
        torch.testing.assert_close(mask, expected, rtol=0, atol=TOLERANCE)
        assert torch.equal(mask == 0, expected == 0)


def test_deciding_for_the_target_and_for_now_differ_in_the_vectors() -> None:
    assert VECTORS["deterministic_target"]["head_z"] != VECTORS["deterministic_current"]["head_z"]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 2, 3, 50]))
def test_decided_masks_have_the_targets_counts_in_every_layer(seed: int, levels: int) -> None:
    gates = Gates(GROUPED, GROUPED_TARGET)
    random_logits(gates, seed, levels)
    target = sizes(GROUPED_TARGET)
    for kind, mask in gates.decide().items():
        open_units = mask != 0
        assert open_units.sum(-1).unique().tolist() == [target[kind][-1]], kind
        logits = gates.logits[kind]
        lowest_kept = logits.where(open_units, torch.inf).amin(-1)
        highest_pruned = logits.where(~open_units, -torch.inf).amax(-1)
        assert (lowest_kept >= highest_pruned).all(), kind
        torch.testing.assert_close(mask[open_units], torch.sigmoid(logits[open_units].detach() * 0.8 / TEMPERATURE))


@pytest.mark.parametrize("balance", [1, 2, 4])
def test_balanced_masks_keep_as_many_units_in_every_block(balance: int) -> None:
    source = Shape(hidden=8, layers=3, heads=16, kv_heads=8, head_dim=2, ffn=24, vocab=2)
    target = Shape(hidden=4, layers=2, heads=4, kv_heads=4, head_dim=2, ffn=12, vocab=2)
    gates = Gates(source, target, balance=balance)
    random_logits(gates, 3, 50)
    for kind, kept in (("kv_heads", 4), ("ffn", 12)):
        decided = gates.blocks(kind, getattr(gates.decide(), kind) != 0).sum(-1)
        assert decided.shape == (3, balance)
        assert decided.unique().tolist() == [kept // balance]
        expected = gates.blocks(kind, getattr(gates.expected(), kind)).sum(-1)
        now = gates.blocks(kind, getattr(gates.decide_expected(), kind) != 0).sum(-1)
        assert ((now - expected).abs() <= 0.5 + 1e-5).all()


def test_balance_that_does_not_split_is_named() -> None:
    source = Shape(hidden=8, layers=3, heads=8, kv_heads=8, head_dim=2, ffn=24, vocab=2)
    target = Shape(hidden=4, layers=2, heads=6, kv_heads=6, head_dim=2, ffn=12, vocab=2)
    with pytest.raises(
        ValueError, match=r"kv_heads of the target=6 does not split over balance=4; use balance of 1, 2"
    ):
        Gates(source, target, balance=4)


def test_among_ties_the_first_units_are_kept() -> None:
    mask = Gates(GROUPED, GROUPED_TARGET).decide().hidden
    assert mask is not None
    assert (mask != 0).nonzero().flatten().tolist() == list(range(GROUPED_TARGET.hidden))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([1, 2, 3, 50]))
def test_masks_decided_for_now_keep_the_rounded_expected_counts(seed: int, levels: int) -> None:
    gates = Gates(GROUPED, GROUPED_TARGET)
    random_logits(gates, seed, levels)
    masks = dict(gates.decide_expected().items())
    for kind, probabilities in gates.expected().items():
        kept = (masks[kind] != 0).sum(-1)
        assert ((kept - probabilities.sum(-1)).abs() <= 0.5 + 1e-5).all(), kind


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 10**9), levels=st.sampled_from([1, 2, 50]))
def test_samples_are_within_0_and_1_and_pass_a_gradient_exactly_where_not_clamped(
    seed: int, step: int, levels: int
) -> None:
    gates = Gates(GROUPED, GROUPED_TARGET, seed=seed, dtype=torch.float64)
    random_logits(gates, seed % 10**6, levels)
    masks = gates.sample(step, 0)
    sum(mask.sum() for _, mask in masks.items()).backward()
    for kind, mask in masks.items():
        gradient = gates.logits[kind].grad
        assert gradient is not None
        assert mask.min() >= 0
        assert mask.max() <= 1
        clamped = (mask == 0) | (mask == 1)
        assert torch.equal(gradient == 0, clamped), kind
        assert torch.isfinite(gradient).all()


def test_a_gate_that_lands_on_0_or_1_without_being_clamped_passes_no_gradient() -> None:
    gates = Gates(MULTI_HEAD, MULTI_HEAD_TARGET)
    half = {kind: torch.full_like(logits, 0.5) for kind, logits in gates.logits.items()}
    low, high = STRETCH
    for bound in (0.0, 1.0):
        # Walk the float32 numbers around the logit at which the stretched value crosses the bound until one hits it.
        centre = np.float32(TEMPERATURE * log((bound - low) / (high - bound)))
        neighbours = torch.from_numpy(centre + np.arange(-400, 400, dtype=np.float32) * np.spacing(centre))
        stretched = torch.sigmoid(neighbours / TEMPERATURE) * (high - low) + low
        hits = neighbours[stretched == bound]
        assert len(hits), "no float32 logit lands on the bound: this test would show nothing"
        gates.logits["hidden"].data.fill_(hits[0].item())
        gates.logits["hidden"].grad = None
        mask = gates.sample_from(half).hidden
        assert mask is not None
        assert (mask == bound).all()
        mask.sum().backward()
        assert gates.logits["hidden"].grad is not None
        assert not gates.logits["hidden"].grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_expected_is_the_share_of_samples_that_are_open(kind: str) -> None:
    source = Shape(hidden=40, layers=20, heads=400, kv_heads=20, head_dim=2, ffn=20, vocab=2)
    target = Shape(hidden=20, layers=10, heads=100, kv_heads=10, head_dim=2, ffn=10, vocab=2)
    gates = Gates(source, target, seed=3)
    random_logits(gates, 1, 5)
    draws = 400
    with torch.no_grad():
        share = sum((getattr(gates.sample(step, 1), kind) != 0).float() for step in range(draws)) / draws
        probability = getattr(gates.expected(), kind)
    # Each unit within six standard deviations of its binomial share.
    assert ((share - probability).abs() <= 6 * (probability * (1 - probability) / draws).sqrt() + 1e-9).all()


MOMENTS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**20), st.sampled_from(KINDS))


@settings(max_examples=60, deadline=None)
@given(first=MOMENTS, second=MOMENTS)
def test_noise_is_a_function_of_seed_step_microbatch_and_kind(
    first: tuple[int, int, int, str], second: tuple[int, int, int, str]
) -> None:
    assert torch.equal(uniform(*first, (3, 9)), uniform(*first, (3, 9)))
    if first != second:
        assert not np.isin(uniform(*first, (3, 9)), uniform(*second, (3, 9))).any()


@pytest.mark.parametrize("other", [(1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**32, 0), (2**63, 0, 0)])
def test_neighbouring_moments_share_no_noise(other: tuple[int, int, int]) -> None:
    """2**32 apart too: a generator that reads 32 bits of its seed would repeat itself there."""
    assert not np.isin(uniform(*other, "ffn", (500,)), uniform(0, 0, 0, "ffn", (500,))).any()


def test_noise_is_pinned_and_uniform() -> None:
    """A change of these numbers changes the masks of every resumed run."""
    noise = uniform(17, 4711, 3, "ffn", (50_000,))
    torch.testing.assert_close(
        noise[:3],
        torch.tensor([0.182611342795654, 0.2823869095374671, 0.6745220668159425], dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )
    assert noise.min() > 0
    assert noise.max() < 1
    share = torch.histc(noise, 10, 0, 1) / len(noise)
    torch.testing.assert_close(share, torch.full_like(share, 0.1), rtol=0, atol=0.008)  # six standard deviations


def test_a_kinds_noise_does_not_depend_on_what_else_is_pruned() -> None:
    only_ffn = Shape(**{**GROUPED.asdict(), "ffn": GROUPED_TARGET.ffn})
    alone = Gates(GROUPED, only_ffn, seed=5).sample(7, 2)
    assert alone.hidden is alone.layers is alone.kv_heads is alone.heads_per_group is None
    together = Gates(GROUPED, GROUPED_TARGET, seed=5).sample(7, 2)
    assert isinstance(alone.ffn, Tensor)
    assert torch.equal(alone.ffn, together.ffn)


def test_logits_start_fully_open_and_only_where_the_target_is_smaller() -> None:
    gates = Gates(MULTI_HEAD, MULTI_HEAD_TARGET)
    assert set(gates.logits) == {"hidden", "layers", "kv_heads", "ffn"}  # one query per group: nothing to choose
    assert set(Gates(GROUPED, GROUPED_TARGET).logits) == set(KINDS)
    for kind, logits in gates.logits.items():
        assert tuple(logits.shape) == sizes(MULTI_HEAD)[kind]
        torch.testing.assert_close(logits.detach(), torch.full_like(logits, log(100)))


def test_llama_2_7b_to_1_3b_has_357_408_logits() -> None:
    source = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000)
    target = Shape(hidden=2048, layers=24, heads=16, kv_heads=16, head_dim=128, ffn=5504, vocab=32000)
    assert sum(logits.numel() for logits in Gates(source, target).logits.values()) == 357_408


def test_clamp_bounds_the_probability_of_being_open() -> None:
    gates = Gates(MULTI_HEAD, MULTI_HEAD_TARGET)
    for sign, probability in ((-1, 0.047), (1, 0.998)):
        for logits in gates.logits.values():
            logits.data.fill_(sign * 50)
        gates.clamp_()
        for kind, mask in gates.expected().items():
            torch.testing.assert_close(mask, torch.full_like(mask, probability), rtol=0, atol=5e-4)
            assert gates.logits[kind].abs().max() <= LIMIT + 1e-6


def test_state_round_trip_gives_the_same_masks() -> None:
    gates, other = Gates(GROUPED, GROUPED_TARGET, seed=9), Gates(GROUPED, GROUPED_TARGET, seed=9)
    random_logits(gates, 4, 50)
    other.load_state_dict({kind: tensor.clone() for kind, tensor in gates.state_dict().items()})
    for kind, mask in gates.sample(11, 1).items():
        assert torch.equal(mask, getattr(other.sample(11, 1), kind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("ffn"), "expected exactly"),
        (lambda state: state.update(heads=torch.zeros(3)), "expected exactly"),
        (lambda state: state.update(ffn=torch.zeros(3)), r"ffn has size \[3\]; expected \[5, 17\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message: str) -> None:
    gates = Gates(GROUPED, GROUPED_TARGET)
    state = {kind: torch.zeros_like(tensor) for kind, tensor in gates.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        gates.load_state_dict(state)
    assert all((logits == torch.tensor(LIMIT)).all() for logits in gates.logits.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GROUPED, GROUPED), "as large as the source"),
        ((GROUPED_TARGET, GROUPED), "larger than the source"),
        ((GROUPED, GROUPED_TARGET, -1), "seed=-1"),
        ((GROUPED, GROUPED_TARGET, 2**64), f"seed={2**64}"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gates(*arguments)


def test_a_negative_step_is_named() -> None:
    with pytest.raises(ValueError, match="step=-1"):
        Gates(GROUPED, GROUPED_TARGET).sample(-1, 0)
