"""Reference losses: the paper's published prediction, and curves we know."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shear_tron.data.reference import Curve, predict

SIZES = [6738415616, 13015864320, 68976648192]  # LLaMA-2 7B, 13B, 70B
TARGET = 373867520
LLAMA_2 = {  # losses of the three, and the prediction for TARGET
    "CC": ([1.7520, 1.6680, 1.4621], 2.1401),
    "GitHub": ([0.6216, 0.5791, 0.4890], 0.8694),
    "Book": ([1.9063, 1.8242, 1.6450], 2.3625),
    "StackExchange": ([1.4482, 1.3936, 1.2805], 1.7791),
    "Wiki": ([1.4844, 1.3945, 1.2118], 2.0470),
    "ArXiv": ([1.2637, 1.2109, 1.1148], 1.6637),
    "C4": ([1.9219, 1.8486, 1.6848], 2.3139),
}


def test_llama_2_predicts_the_published_losses() -> None:
    table = {size: {name: values[place] for name, (values, _) in LLAMA_2.items()} for place, size in enumerate(SIZES)}
    predicted = predict(table, TARGET)
    assert list(predicted) == list(LLAMA_2)
    for name, (_, expected) in LLAMA_2.items():
        assert predicted[name] == pytest.approx(expected, abs=5e-4), name


@pytest.mark.parametrize("name", LLAMA_2)
def test_three_sizes_are_met_exactly(name: str) -> None:
    values, _ = LLAMA_2[name]
    curve = Curve.fit(SIZES, values)
    assert [curve.loss(size) for size in SIZES] == pytest.approx(values, abs=1e-9)


@given(floor=st.floats(0.3, 2), scale=st.floats(0.2, 3), exponent=st.floats(0.05, 1))
@settings(max_examples=40, deadline=None)
def test_a_known_curve_is_found_again(floor: float, scale: float, exponent: float) -> None:
    true = Curve(floor, scale * 1e8**exponent, exponent)
    sizes = [1e8, 4e8, 1.5e9, 7e9, 3e10]
    found = Curve.fit(sizes, [true.loss(size) for size in sizes])
    for size in (3e7, 1e9, 1e11):
        assert found.loss(size) == pytest.approx(true.loss(size), abs=2e-4)


def test_noise_is_averaged_over_many_sizes() -> None:
    true = Curve(1.2, 40.0, 0.2)
    sizes = [10 ** (8 + step / 10) for step in range(30)]
    noisy = [true.loss(size) + (0.002 if place % 2 else -0.002) for place, size in enumerate(sizes)]
    assert Curve.fit(sizes, noisy).loss(5e7) == pytest.approx(true.loss(5e7), abs=0.02)


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([1e9, 2e9], [2.0, 1.9], "give losses of three sizes"),
        ([1e9, 1e9, 2e9], [2.0, 2.0, 1.9], "give losses of three sizes"),
        ([1e9, 2e9, 3e9], [1.8, 1.9, 1.95], "do not fall"),
        ([1e9, 2e9, 3e9], [1.8, float("nan"), 1.5], "must be finite"),
        ([-1.0, 2e9, 3e9], [1.8, 1.7, 1.5], "must be finite numbers and positive"),
    ],
)
def test_losses_that_no_curve_fits_are_refused(sizes: list[float], losses: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve.fit(sizes, losses)


def test_every_size_needs_every_domain() -> None:
    with pytest.raises(ValueError, match="model of 2 parameters has no loss of code"):
        predict({1: {"web": 2.0, "code": 1.0}, 2: {"web": 1.9}, 4: {"web": 1.8, "code": 0.9}}, 1e6)
