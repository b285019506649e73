"""Other programs' logs hold a run's numbers, and go on where it was resumed."""

from pathlib import Path

import pytest

from shear_tron.config import ConfigError
from shear_tron.train import viewers
from shear_tron.train.config import LogConfig, RunConfig
from shear_tron.train.metrics import Log

LINE = {"step": 3, "loss": 2.5, "held_out": {"wiki": 3.0, "book": float("nan")}, "multipliers": {"ffn": [1, 2]}}


def open_log(run: Path, first: int, **settings: object) -> Log:
    config = RunConfig.model_validate(
        {
            "run": str(run),
            "model": "m",
            "data": {"folder": "d", "sequence": 8},
            "train": {"steps": 9, "batch": 1},
            "log": settings,
        }
    )
    return Log(run, first, 9, "training", True, viewers.viewers(run, first, config))


def test_numbers_are_named_by_where_they_are() -> None:
    assert dict(viewers.numbers(LINE)) == {
        "step": 3, "loss": 2.5, "held_out/wiki": 3.0, "multipliers/ffn/0": 1, "multipliers/ffn/1": 2
    }  # fmt: skip


def test_tensorboard_reads_back_what_was_written_and_forgets_what_was_undone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, loss in ((0, 9.0), (2, 2.5)):
        log = open_log(tmp_path, first, tensorboard=True)
        for step in range(first + 1, 4):
            log.write({**LINE, "step": step, "loss": loss})
        log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 9.0), (2, 9.0), (3, 2.5)]
    assert events.Scalars("held_out/wiki")[-1].value == 3.0


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_per_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for first in (0, 3):
        log = open_log(tmp_path, first, wandb="shear")
        log.write({**LINE, "step": first + 1})
        log.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.stem for file in files} == {f"run-{(tmp_path / viewers.WANDB_ID).read_text()}"}
    assert any(b"held_out/wiki" in file.read_bytes() for file in files)


def test_a_viewer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'shear-tron\[wandb\]'"):
        viewers.require(LogConfig(wandb="shear"))
    viewers.require(LogConfig())
