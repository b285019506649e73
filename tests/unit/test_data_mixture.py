"""The mixture: the paper's numbers, and what must hold for every update."""

import json
import logging
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shear_tron.data.mixture import Mixture, MixtureConfig
from shear_tron.data.rules.dro import worst_case

NAMES = ["cc", "github", "book", "wiki"]
START = np.array([0.67, 0.045, 0.045, 0.24])
REFERENCES = {"cc": 1.97, "github": 0.75, "book": 2.1, "wiki": 1.7}
UPDATES = ["algorithm1", "unclipped", "dro"]

losses = st.lists(st.floats(0.01, 12), min_size=4, max_size=4).map(lambda values: dict(zip(NAMES, values, strict=True)))
starts = st.lists(st.floats(0.01, 1), min_size=4, max_size=4).map(lambda values: np.array(values) / sum(values))


def mixture(start: Any = START, update: str = "algorithm1", **config: Any) -> Mixture:
    """Under ``update``; of ``config``, what is no bound is the rule's own."""
    bounds = {key: config.pop(key) for key in ("floor", "ceiling", "max_change") if key in config}
    return Mixture(NAMES, start, REFERENCES, MixtureConfig(update=update, **bounds, **{update: config}))


def excess(*values: float) -> dict[str, float]:
    """Losses that exceed the references by ``values``."""
    return {name: REFERENCES[name] + value for name, value in zip(NAMES, values, strict=True)}


# Algorithm 1


def test_algorithm_1_by_hand() -> None:
    """w * exp(max(loss - reference, 0)), normalised: the paper's lines, no smoothing."""
    raised = START * np.exp([0.3, 0.0, 0.1, 0.0])  # github and wiki are better than their references
    new = mixture(smoothing=0).update(excess(0.3, -0.2, 0.1, -1.0))
    np.testing.assert_allclose(new, raised / raised.sum(), rtol=1e-12)


def test_unclipped_is_the_released_softmax() -> None:
    """softmax(log w + difference), then (1 - 1e-4) of it plus 1e-4 spread evenly."""
    logits = np.log(START) + np.array([0.3, -0.2, 0.1, -1.0])
    softmax = np.exp(logits) / np.exp(logits).sum()
    new = mixture(update="unclipped").update(excess(0.3, -0.2, 0.1, -1.0))
    np.testing.assert_allclose(new, (1 - 1e-4) * softmax + 1e-4 / 4, rtol=1e-12)


def test_step_size_scales_the_exponent() -> None:
    half = mixture(smoothing=0, step_size=0.5).update(excess(0.3, 0, 0.1, 0))
    np.testing.assert_allclose(half, mixture(smoothing=0).update(excess(0.15, 0, 0.05, 0)), rtol=1e-12)


def test_a_domain_at_weight_zero_comes_back_through_smoothing() -> None:
    new = mixture(start=[1, 1, 0, 1]).update(excess(0, 0, 0.5, 0))
    assert new[2] == pytest.approx(1e-4 / 4)


def test_constant_stays_and_needs_no_references() -> None:
    constant = Mixture(NAMES, START, {}, MixtureConfig(update="constant"))
    for _ in range(3):
        np.testing.assert_array_equal(constant.update(excess(3, 0, -1, 0)), START)


# A bounded step


@pytest.mark.parametrize("update", ["algorithm1", "unclipped"])
def test_a_bounded_step_changes_no_ratio_by_more_and_keeps_the_order(update: str) -> None:
    """With losses of several nats one free update leaves one domain, a bounded one moves towards it."""
    far = excess(6.0, 4.0, 5.0, 2.0)
    free, bounded = mixture(update=update, smoothing=0), mixture(update=update, smoothing=0, max_ratio=1.5)
    assert free.update(far)[0] > 0.95
    change = bounded.update(far) / START
    assert change.max() / change.min() == pytest.approx(1.5)
    assert np.argsort(change).tolist() == [3, 1, 2, 0]
    for _ in range(3):
        bounded.update(far)
    assert bounded.weights.max() < 0.9


@given(history=st.lists(losses, min_size=1, max_size=4), update=st.sampled_from(["algorithm1", "unclipped"]))
@settings(deadline=None)
def test_a_bound_that_is_not_reached_changes_no_bit(history: list[dict[str, float]], update: str) -> None:
    free, bounded = mixture(update=update), mixture(update=update, max_ratio=1e9)
    for each in history:
        np.testing.assert_array_equal(free.update(each), bounded.update(each))


def test_an_unbounded_step_of_several_nats_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mixture().update(excess(0.5, 0.1, 0, 0))
        assert not caplog.text
        mixture().update(excess(3.0, 0.5, 1.0, 0))
    assert "excess losses are up to 3.0 nats apart" in caplog.text
    assert "set max_ratio" in caplog.text


def test_a_restored_mixture_keeps_its_own_start() -> None:
    """Where the starting weights came from may have changed since."""
    first = mixture(update="dro")
    first.update(excess(0.3, 0, 0.2, 0))
    second = mixture(start=[0.25] * 4, update="dro")
    second.restore(json.loads(json.dumps(first.state())))
    np.testing.assert_array_equal(first.update(excess(0.1, 0.2, 0, 0)), second.update(excess(0.1, 0.2, 0, 0)))


# DRO


def test_worst_case_maximises_within_the_ball() -> None:
    """Against 200,000 random members of the ball; the edge of the ball is reached."""
    random = np.random.default_rng(0)
    prior, gap, radius, minimum = START, np.array([0.1, 0.9, 0.3, 0.2]), 0.05, 0.2

    def divergence(q: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return (prior * (q / prior - 1) ** 2).sum(axis=-1) / 2  # type: ignore[no-any-return]

    best = worst_case(gap, prior, radius, minimum)
    assert divergence(best) == pytest.approx(radius, rel=1e-9)
    candidates = random.dirichlet(prior * 30, 200_000)
    inside = candidates[(divergence(candidates) <= radius) & (candidates >= minimum * prior).all(axis=1)]
    assert len(inside) > 1000
    assert (inside @ gap).max() <= best @ gap + 1e-9


def test_worst_case_by_hand() -> None:
    """Two equal domains: q = (1 + t, 1 - t) / 2 has divergence t**2 / 2, so t = sqrt(2 * radius)."""
    weights = worst_case(np.array([1.0, 0.0]), np.array([0.5, 0.5]), 0.02, 1e-6)
    np.testing.assert_allclose(weights, [0.6, 0.4], rtol=1e-9)


def test_worst_case_keeps_the_minimum() -> None:
    weights = worst_case(np.array([1.0, 0.0, 0.0]), np.array([0.2, 0.4, 0.4]), 100.0, 0.25)
    np.testing.assert_allclose(weights[1:] / weights[1:].sum(), [0.5, 0.5])
    assert weights[0] > 0.7
    assert (weights > 0.25 * np.array([0.2, 0.4, 0.4]) / 3).all()


@given(
    gap=st.lists(st.integers(-300, 300).map(lambda cents: cents / 100), min_size=4, max_size=4), shift=st.floats(-5, 5)
)
@settings(deadline=None)
def test_worst_case_ignores_a_shift_of_all(gap: list[float], shift: float) -> None:
    first, second = (worst_case(np.array(gap) + add, START, 0.05, 0.2) for add in (0.0, shift))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_dro_remembers_losses_and_goes_part_of_the_way() -> None:
    robust = mixture(update="dro", decay=0.5, step_size=0.25)
    first = robust.update(excess(0.1, 0.4, 0, 0))
    target = worst_case(np.array([0.1, 0.4, 0.0, 0.0]), START, 0.05, 0.2)
    np.testing.assert_allclose(first, START + 0.25 * (target - START), rtol=1e-9)
    second = robust.update(excess(0.5, 0.4, 0, 0))
    target = worst_case(np.array([0.3, 0.4, 0.0, 0.0]), START, 0.05, 0.2)  # averages of both updates
    np.testing.assert_allclose(second, first + 0.25 * (target - first), rtol=1e-9)


# Laws


@given(start=starts, history=st.lists(losses, min_size=1, max_size=4), update=st.sampled_from(UPDATES))
@settings(deadline=None)
def test_weights_stay_a_distribution(start: Any, history: list[dict[str, float]], update: str) -> None:
    m = mixture(start, update=update)
    for each in history:
        weights = m.update(each)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (weights >= 0).all()
        np.testing.assert_array_equal(weights, m.weights)


@given(
    history=st.lists(losses, min_size=1, max_size=6),
    update=st.sampled_from(UPDATES),
    floor=st.floats(0, 0.04),
    ceiling=st.floats(0.68, 1),
    change=st.floats(0.001, 1),
)
@settings(deadline=None)
def test_floor_ceiling_and_largest_change_hold(
    history: list[dict[str, float]], update: str, floor: float, ceiling: float, change: float
) -> None:
    m = mixture(update=update, floor=floor, ceiling=ceiling, max_change=change)
    before = m.weights
    for each in history:
        after = m.update(each)
        assert after.sum() == pytest.approx(1, abs=1e-9)
        assert after.min() >= floor - 1e-9
        assert after.max() <= ceiling + 1e-9
        assert np.abs(after - before).max() <= change + 1e-9
        before = after


@given(start=starts, common=st.floats(-2, 5), update=st.sampled_from(UPDATES))
@settings(deadline=None)
def test_equal_excess_leaves_proportions(start: Any, common: float, update: str) -> None:
    smoothing = {} if update == "dro" else {"smoothing": 0}
    new = mixture(start, update=update, **smoothing).update(excess(*[common] * 4))
    np.testing.assert_allclose(new, start, atol=1e-6)


@pytest.mark.parametrize("update", UPDATES)
def test_the_domain_furthest_behind_gains_most(update: str) -> None:
    new = mixture(update=update).update(excess(0.1, 0.5, 0.1, 0.0))
    assert int(np.argmax(new / START)) == 1
    assert new[1] > START[1]


def test_an_enormous_loss_stays_finite() -> None:
    new = mixture().update(excess(1e4, 0, 0, 0))
    assert np.isfinite(new).all()
    assert new[0] > 0.99


def test_a_small_change_leaves_unbounded_proportions() -> None:
    """Domains within the bounds keep their proportions to each other when another is held back."""
    free, held = (mixture(start=[0.25] * 4, smoothing=0, ceiling=c).update(excess(2, 0.3, 0.1, 0)) for c in (1.0, 0.4))
    assert held[0] == pytest.approx(0.4)
    np.testing.assert_allclose(held[1:] / held[1:].sum(), free[1:] / free[1:].sum(), rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize("update", UPDATES)
def test_a_domain_without_a_finite_loss_leaves_all_weights(
    bad: float | None, update: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = excess(0.5, 0.1, 0.1, 0.1)
    if bad is None:
        del given["book"]
    else:
        given["book"] = bad
    m = mixture(update=update)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(m.update(given), START)
    assert "no finite held-out loss of book" in caplog.text
    expected = mixture(update=update).update(excess(0.5, 0.1, 0.1, 0.1))
    np.testing.assert_array_equal(m.update(excess(0.5, 0.1, 0.1, 0.1)), expected)  # nothing poisoned


@pytest.mark.parametrize("update", [*UPDATES, "constant"])
def test_restored_goes_on_as_if_never_stopped(update: str) -> None:
    whole, first = mixture(update=update), mixture(update=update)
    history = [excess(0.3, -0.1, 0.2, 0.5), excess(0.2, 0.1, 0.1, 0.1), excess(0.0, 0.4, 0.1, -0.1)]
    for each in history:
        whole.update(each)
    first.update(history[0])
    second = mixture(update=update)
    second.restore(json.loads(json.dumps(first.state())))
    for each in history[1:]:
        second.update(each)
    np.testing.assert_array_equal(second.weights, whole.weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1, 2]}, "weights="),
        ({"weights": [0.5, 0.5, 0.5, -0.5]}, "weights="),
        ({"references": {"cc": 1.0}}, "domain 'github' has no reference loss"),
        ({"references": REFERENCES | {"wiki": math.nan}}, "domain 'wiki' has no reference loss"),
        ({"references": REFERENCES | {"arxiv": 1.0}}, "reference loss of unknown domain 'arxiv'"),
        ({"config": MixtureConfig(floor=0.3)}, "leave no weights for 4 domains; use floor <= 0.25 <= ceiling"),
        ({"config": MixtureConfig(ceiling=0.2)}, "leave no weights for 4 domains"),
        ({"config": MixtureConfig(floor=0.1)}, "weight 0.045 of domain 'github' is outside"),
        ({"weights": [1, 1, 0, 1], "config": MixtureConfig(update="dro")}, "make every one larger than 0"),
    ],
)
def test_bad_mixtures_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"names": NAMES, "weights": START, "references": REFERENCES, "config": MixtureConfig()} | arguments
    with pytest.raises(ValueError, match=message):
        Mixture(**given)


def test_bad_configs_and_losses_are_refused() -> None:
    for values in (
        {"algorithm1": {"step_size": 0}},
        {"algorithm1": {"max_ratio": 1}},
        {"floor": -1},
        {"update": "doremi"},
        {"flor": 0.1},
        {"dro": {"step_size": 2}},
        {"constant": {"step_size": 1}},
    ):
        with pytest.raises(ValidationError):
            MixtureConfig(**values)
    with pytest.raises(ValueError, match="loss of unknown domain 'arxiv'"):
        mixture().update({"arxiv": 1.0})
    with pytest.raises(ValueError, match="saved mixture is of a, not of cc"):
        mixture().restore({"weights": {"a": 1.0}, "start": {"a": 1.0}, "memory": {}})
