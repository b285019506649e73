"""Reference losses: the paper's published prediction, and curves we know."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from shear_tron.data.prepare import DomainSource, PrepareConfig, prepare
from shear_tron.data.sampler import held_out
from shear_tron.use.reference import Curve, ReferenceConfig, predict, reference_losses

from .test_data_prepare import TEXTS, tokenizer, write_jsonl

__all__ = ["tokenizer"]

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


# The command


def test_a_file_of_losses_predicts_a_size(tmp_path: Path) -> None:
    table = {size: {name: values[place] for name, (values, _) in LLAMA_2.items()} for place, size in enumerate(SIZES)}
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump(table))
    config = ReferenceConfig(losses=str(tmp_path / "losses.yaml"), parameters=TARGET, output=str(tmp_path / "out.yaml"))
    assert reference_losses(config)["CC"] == pytest.approx(2.1401, abs=5e-4)
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["C4"] == pytest.approx(2.3139, abs=5e-4)


def save_model(folder: Path, tokenizer: str, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(hidden)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, max_position_embeddings=64, **sizes))
    model.save_pretrained(folder)
    shutil.copy(f"{tokenizer}/tokenizer.json", folder)
    return model.eval()


@pytest.fixture
def data(tmp_path: Path, tokenizer: str) -> str:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", TEXTS[::2])
    sources = {name: DomainSource(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"}
    values = {"output": str(tmp_path / "tokens"), "tokenizer": tokenizer, "domains": sources, "held_out": 0.2}
    return prepare(PrepareConfig(**values, workers=1)).folder


def test_a_single_model_is_measured(tmp_path: Path, tokenizer: str, data: str) -> None:
    """Against the loss that transformers itself reports for the same windows."""
    model = save_model(tmp_path / "model", tokenizer, 16)
    from shear_tron.data.manifest import Manifest

    config = ReferenceConfig(
        models=[str(tmp_path / "model")], folder=data, sequence=32, windows=7, batch=3, device="cpu"
    )
    found = reference_losses(config)
    assert list(found) == ["a", "b"]
    for name in "ab":
        windows = held_out(Manifest.read(data), name, 32, 7)
        with torch.no_grad():
            expected = model(windows, labels=windows).loss
        assert found[name] == pytest.approx(float(expected), abs=1e-5)


def test_measured_and_given_sizes_go_together(tmp_path: Path, tokenizer: str, data: str) -> None:
    model = save_model(tmp_path / "model", tokenizer, 16)
    losses = {10**9: {"a": 2.0, "b": 1.5}, 10**10: {"a": 1.5, "b": 1.2}}
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump(losses))
    values = {"models": [str(tmp_path / "model")], "folder": data, "sequence": 32, "device": "cpu"}
    measured = reference_losses(ReferenceConfig(**values))
    both = reference_losses(ReferenceConfig(**values, losses=str(tmp_path / "losses.yaml"), parameters=10**8))
    expected = predict(losses | {model.num_parameters(): measured}, 10**8)
    assert both == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to take reference losses from"),
        ({"models": ["m"]}, "measured on prepared data; give its folder"),
        ({"losses": "/nowhere.yaml"}, "losses=/nowhere.yaml cannot be read"),
    ],
)
def test_sources_that_do_not_suffice_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference_losses(ReferenceConfig(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["[1, 2]", "a: {b: 1}", "1e9: 3", "1: {a: x}", ": {"])
def test_files_that_are_no_table_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "losses.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"it must be \{parameters: \{domain: loss\}\}") as error:
        reference_losses(ReferenceConfig(losses=str(tmp_path / "losses.yaml"), parameters=5))
    assert "\n" not in str(error.value)


def test_many_sizes_need_the_one_to_predict(tmp_path: Path) -> None:
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump({10**9: {"a": 2.0}, 10**10: {"a": 1.5}}))
    with pytest.raises(ValueError, match="losses of 2 sizes need parameters"):
        reference_losses(ReferenceConfig(losses=str(tmp_path / "losses.yaml")))
