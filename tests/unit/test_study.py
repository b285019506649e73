"""What a study that goes on from a recorded one begins with, and what its analysis is asked for."""

import runpy
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "examples" / "study"


def test_what_is_recorded_is_kept_to_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(STUDY), *sys.path])
    begin_with = runpy.run_path(str(STUDY / "study.py"))["begin_with"]
    for place, content in (("recorded", b"1"), ("other", b"2")):
        (tmp_path / place / "source").mkdir(parents=True)
        (tmp_path / place / "source" / "model.safetensors").write_bytes(content)
    (tmp_path / "recorded" / "tuned.json").write_text("{}")
    for _ in range(2):  # the same command again
        begin_with(tmp_path / "recorded", tmp_path / "new")
    assert (tmp_path / "new" / "source" / "model.safetensors").read_bytes() == b"1"
    with pytest.raises(SystemExit, match="has a source of its own"):
        begin_with(tmp_path / "recorded", tmp_path / "other")
    assert not (tmp_path / "other" / "tuned.json").exists()


def test_an_arm_that_is_none_is_named_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["analyse.py", str(STUDY / "recorded"), "--arm", "fischer"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(STUDY / "analyse.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert "--arm fischer: " in said
    assert "fisher_once" in said
