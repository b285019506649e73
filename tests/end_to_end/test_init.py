"""Three commands from a model and a folder of text to a running pruning: init, prepare, train."""

from pathlib import Path

import pytest
import yaml

from shear_tron import cli
from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import read_architecture
from shear_tron.config import load
from shear_tron.params import count
from shear_tron.train.config import RunConfig


def sheared(model: Path, config: RunConfig) -> Architecture:
    source = read_architecture(model)
    assert config.prune
    return source.resized(config.prune.target.shape(source.shape))


def test_from_text_to_a_pruned_model(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["init", str(world / "model"), "--data", str(world / "text"), "--tokens", "8000", "--target", "70000"]
    assert cli.main(given) == 0
    assert "shear-tron prepare prepare.yaml" in capsys.readouterr().out
    prepared = yaml.safe_load(Path("prepare.yaml").read_text())
    assert set(prepared["domains"]) == {"colours", "numbers", "trees"}
    assert cli.main(["prepare", "prepare.yaml", "workers=1", "held_out=0.1"]) == 0
    assert cli.main(["show", "prune.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "made with this model's tokenizer" in shown
    assert "closes an open gate: enough" in shown
    assert cli.main(["show", "continue.yaml", "--after", "prune.yaml"]) == 0
    assert "epochs at weight 0.3" in capsys.readouterr().out
    assert count(sheared(world / "model", load(RunConfig, "prune.yaml"))) == pytest.approx(70000, rel=0.03)
    beside = [
        line.index("# ") for line in Path("prune.yaml").read_text().splitlines() if line[0:1].isspace() and "# " in line
    ]
    assert beside == [35] * len(beside)
    assert cli.main(["train", "prune.yaml", "train.steps=9"]) == 0
    assert cli.main(["extract", "runs/model-to-70000", "models/small"]) == 0
    assert cli.main(["train", "continue.yaml", "train.steps=2"]) == 0
    assert cli.main(given) == 2
    assert "prepare.yaml, prune.yaml, continue.yaml exist;" in capsys.readouterr().err


def test_json_that_is_no_text_is_left_out(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["init", str(world / "model"), "--data", str(tmp_path / "text"), "--target", "70000"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "sources.json").write_text('{\n "wiki": {"licence": "CC BY-SA"}\n}\n')
    assert cli.main([*given, "--output", str(tmp_path)]) == 2
    assert "no file there begins with a line of JSON" in capsys.readouterr().err
    (tmp_path / "text" / "wiki.jsonl").write_text('{"content": "red"}\n')
    assert cli.main([*given, "--output", str(tmp_path)]) == 0
    assert set(yaml.safe_load((tmp_path / "prepare.yaml").read_text())["domains"]) == {"wiki"}
    assert "left out: its first line is no record of JSON" in (tmp_path / "prepare.yaml").read_text()


def test_on_prepared_data(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["init", str(world / "model"), "--data", str(world / "data"), "--tokens", "8x", "--target", "70000"]
    assert cli.main([*given, "--output", str(tmp_path)]) == 2
    assert "'8x' is not a number" in capsys.readouterr().err
    given[5] = "8000"
    assert cli.main([*given, "--output", str(tmp_path)]) == 0
    assert "shear-tron prepare" not in capsys.readouterr().out
    assert cli.main(["show", str(tmp_path / "prune.yaml")]) == 0
    given[3] = str(tmp_path / "nowhere")
    assert cli.main([*given, "--output", str(tmp_path)]) == 2
    assert "is not a folder" in capsys.readouterr().err
