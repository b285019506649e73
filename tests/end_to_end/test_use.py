"""A finished model is measured and spoken with."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shear_tron import cli
from shear_tron.checkpoint import huggingface
from shear_tron.checkpoint.model_folder import open_model
from shear_tron.data.manifest import Manifest
from shear_tron.data.sampler import held_out
from shear_tron.use.compare import Mean, compare, table
from shear_tron.use.generate import generate

SEQUENCE, WINDOWS = 16, 12


@pytest.fixture(scope="module")
def other(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's model with its head a little turned."""
    folder = tmp_path_factory.mktemp("other") / "other"
    model = open_model(world / "model")
    noise = torch.Generator().manual_seed(3)

    def changed(name: str) -> torch.Tensor:
        tensor = model.read(name)
        return tensor + 0.02 * torch.randn(tensor.shape, generator=noise) if name == "lm_head" else tensor

    named = ((name, changed(name)) for name in model.names())
    huggingface.write(folder, model.architecture, named, tokenizer_from=world / "model")
    return folder


@pytest.fixture(scope="module")
def result(world: Path, other: Path) -> dict[str, Any]:
    return compare([str(world / "model"), str(other)], str(world / "data"), SEQUENCE, WINDOWS, batch=5)


def test_losses_errors_and_differences_are_their_definitions(world: Path, other: Path, result: dict[str, Any]) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    losses = {}
    windows = held_out(Manifest.read(str(world / "data")), "trees", SEQUENCE, WINDOWS)
    for folder in (world / "model", other):
        model = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(windows[:, :-1]).logits
        each = torch.nn.functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none").mean(1).double()
        losses[str(folder)] = each
        told = result["models"][str(folder)]["domains"]["trees"]
        assert told["loss"] == pytest.approx(each.mean().item(), abs=1e-5)
        assert told["standard_error"] == pytest.approx(each.std().item() / math.sqrt(WINDOWS), rel=1e-3)
        assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))
        end = tokenizer.eos_token_id
        spelt = sum(len(tokenizer.decode([i for i in row.tolist() if i != end]).encode()) for row in windows[:, 1:])
        bits = each.sum().item() * SEQUENCE / math.log(2) / spelt
        assert told["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    first, second = losses.values()
    difference = result["differences"][str(other)]["trees"]
    assert difference["loss"] == pytest.approx((second - first).mean().item(), abs=1e-5)
    assert difference["standard_error"] == pytest.approx((second - first).std().item() / math.sqrt(WINDOWS), rel=1e-2)


def test_pairing_sees_what_two_errors_would_hide(other: Path, result: dict[str, Any]) -> None:
    told, difference = result["models"][str(other)]["mean"], result["differences"][str(other)]["mean"]
    assert difference["standard_error"] < told["standard_error"]
    assert json.loads(json.dumps(result)) == result


def test_a_mean_of_one_window_has_no_error() -> None:
    mean = Mean.of(torch.tensor([2.0]))
    assert (mean.value, math.isnan(mean.error)) == (2.0, True)


def test_eval_prints_a_table_and_writes_json(
    world: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], result: dict[str, Any]
) -> None:
    arguments = ["--sequence", str(SEQUENCE), "--windows", str(WINDOWS), "--json", str(tmp_path / "found.json")]
    assert cli.main(["eval", str(world / "model"), str(other), str(world / "data"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == table(json.loads((tmp_path / "found.json").read_text())).strip()
    loss = result["models"][str(other)]["domains"]["colours"]["loss"]
    (line,) = [line for line in printed.split(str(other))[-1].splitlines() if line.startswith("colours")]
    assert f"{loss:.4f} ± " in line


def test_a_nanotron_checkpoint_has_the_same_losses(world: Path, tmp_path: Path) -> None:
    from shear_tron.architecture import Architecture
    from shear_tron.checkpoint import nanotron
    from shear_tron.checkpoint.nanotron_config import read_model_config
    from shear_tron.params import params
    from shear_tron.shape import Shape

    architecture = Architecture(Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=24, vocab=320))
    noise = torch.Generator().manual_seed(0)
    tensors = {p.name: 0.2 * torch.randn(p.size, generator=noise) for p in params(architecture)}
    huggingface.write(tmp_path / "hf", architecture, tensors.items(), tokenizer_from=world / "model")
    nanotron.write(tmp_path / "nano", architecture, tensors.items(), dtype=torch.float32)
    assert read_model_config(tmp_path / "nano/model_config.json")[0] == architecture
    folders = [str(tmp_path / "hf"), str(tmp_path / "nano")]
    found = compare(folders, str(world / "data"), SEQUENCE, WINDOWS)
    assert found["differences"][folders[1]]["mean"]["loss"] == pytest.approx(0, abs=1e-5)
    assert found["models"][folders[0]]["parameters"] == found["models"][folders[1]]["parameters"]


@pytest.mark.parametrize(
    ("models", "match"),
    [(["model", "model"], "names a model twice"), (["tokenizer"], "is no model"), (["nowhere"], "is not a tokenizer")],
)
def test_what_cannot_be_measured_is_one_line(
    models: list[str], match: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *(str(world / model) for model in models), str(world / "data"), "--sequence", "16"]) == 2
    said = capsys.readouterr().err
    assert match in said
    assert said.count("\n") == 1


def test_generate_goes_on_as_transformers_does(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    ids = tokenizer("red orange", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    pieces: list[str] = []
    assert generate(str(world / "model"), "red orange", tokens=8, say=pieces.append) == expected
    assert "".join(pieces) == expected
    capsys.readouterr()
    assert cli.main(["generate", str(world / "model"), "red orange", "--tokens", "8"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    warm = [generate(str(world / "model"), "red", tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_generate_refuses_in_one_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(world / "model"), "hello", "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert cli.main(["generate", str(world / "model"), ""]) == 2
    assert "the prompt has no tokens" in capsys.readouterr().err
