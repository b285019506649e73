"""`show`: exact reference counts, and every example configuration."""

import json
from pathlib import Path

import pytest
import torch

from shear_tron import cli
from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import architecture_config
from shear_tron.params import count
from shear_tron.shape import Shape

ROOT = Path(__file__).parents[2]
LLAMA2_7B = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000)
SHEARED_1B = Shape(hidden=2048, layers=24, heads=16, kv_heads=16, head_dim=128, ffn=5504, vocab=32000)
SHEARED_3B = Shape(hidden=2560, layers=32, heads=20, kv_heads=20, head_dim=128, ffn=6912, vocab=32000)
COUNTS = {
    "llama-2-7b": (LLAMA2_7B, 6_738_415_616),
    "sheared-1.3b": (SHEARED_1B, 1_345_423_360),
    "sheared-2.7b": (SHEARED_3B, 2_701_560_320),
    "llama-3-8b": (Shape(4096, 32, 32, 8, 128, 14336, 128256), 8_030_261_248),
    "llama-3.2-1b": (Shape(2048, 16, 32, 8, 64, 8192, 128256, tied=True), 1_235_814_400),
}


@pytest.mark.parametrize(("shape", "parameters"), COUNTS.values(), ids=COUNTS.keys())
def test_counts(shape: Shape, parameters: int) -> None:
    assert count(Architecture(shape)) == parameters


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["show", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ("sheared-llama/prune-1.3b.yaml", ["6,738,415,616", "1,345,423,360"]),
        ("sheared-llama/best-prune-1.3b.yaml", ["6,738,415,616", "1,345,423,360"]),
        ("sheared-llama/prune-2.7b.yaml", ["6,738,415,616", "2,701,560,320"]),
        ("llama-3.1-8b/prune-3.6b.yaml", ["8,030,261,248", "3,606,752,256"]),
        ("pythia/prune-160m.yaml", ["405,334,016", "162,322,944"]),  # the sizes of the two Pythias
        ("qwen3/prune-4b.yaml", ["8,190,735,360", "4,411,424,256"]),
        ("mistral/prune-3b.yaml", ["7,241,732,096", "3,015,355,392"]),
    ],
)
def test_examples_show(
    config: str, parameters: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = shown(capsys, f"examples/{config}")
    assert all(number in text for number in parameters)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("sheared-llama/prune-1.3b.yaml", "nanotron: can go on there, in release 0.4 and main"),
        ("llama-3.1-8b/prune-3.6b.yaml", "nanotron: cannot go on there: rope factor=8: nanotron ignores rope_scaling"),
    ],
)
def test_show_says_whether_nanotron_takes_the_target(
    config: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert said in shown(capsys, f"examples/{config}")


def test_show_says_which_rows_k_quants_refuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    refused = "GGUF: k-quants want rows in multiples of 256, not ffn=5504"
    assert refused in shown(capsys, "examples/sheared-llama/prune-1.3b.yaml")
    assert "GGUF" not in shown(capsys, "examples/sheared-llama/prune-2.7b.yaml")


@pytest.mark.parametrize(("name", "shape"), [("1.3b", SHEARED_1B), ("2.7b", SHEARED_3B)])
def test_continued_examples_show(
    name: str, shape: Shape, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = architecture_config(Architecture(shape, context=4096), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = shown(capsys, f"examples/sheared-llama/continue-{name}.yaml", f"model={tmp_path}")
    assert f"{count(Architecture(shape)):,}" in text


def test_stage_two_can_be_shown_before_its_model_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for recipe in ("best-", ""):
        second, first = (f"examples/sheared-llama/{recipe}{name}-1.3b.yaml" for name in ("continue", "prune"))
        assert "1,345,423,360 parameters" in shown(capsys, second, "--after", first)
    assert cli.main(["show", second]) == 2
    assert "add --after with that run's config" in capsys.readouterr().err
    assert cli.main(["show", second, "--after", second]) == 2
    assert "has no `prune` section" in capsys.readouterr().err


def test_gates_that_cannot_close_are_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = "examples/sheared-llama/prune-1.3b.yaml"
    assert "closes an open gate: enough" in shown(capsys, config)
    short = ["train.steps=10", "prune.warmup_steps=5", "optimizer.warmup_steps=0"]
    assert "they will NOT close" in shown(capsys, config, *short)
    assert "NOT" not in shown(capsys, config, *short, "prune.learning_rate=4")


def test_a_cut_without_steps_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cut = ["train.steps=0", "prune.warmup_steps=0", "prune.method=fisher"]
    assert "steps    0 = 0 tokens" in shown(capsys, "examples/sheared-llama/prune-1.3b.yaml", *cut)


def test_what_ranks_hold_adds_up(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from shear_tron.config import load
    from shear_tron.train.config import RunConfig
    from shear_tron.train.plan import plan
    from shear_tron.train.show import held_parameters

    monkeypatch.chdir(ROOT)
    layout = ["parallel.pp=4", "parallel.tp=1", "parallel.dp=1", "train.batch=32"]
    planned = plan(load(RunConfig, "examples/sheared-llama/prune-1.3b.yaml", layout), 4)
    assert sum(held_parameters(planned, [stage]) for stage in range(4)) == 6_738_415_616
