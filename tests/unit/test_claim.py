"""A run's config while it changes on purpose: the one that made the newest checkpoint is known, whatever happens."""

import shutil
from pathlib import Path

import pytest
from inputs import CONFIG, write_checkpoint

from shear_tron.checkpoint import sharded
from shear_tron.config import ConfigError
from shear_tron.train import claim
from shear_tron.train.claim import claim_run_folder, record_config
from shear_tron.train.config import RunConfig

ALLOWED = ("data.weights",)


def config(run: Path, weight: float) -> RunConfig:
    data = {**CONFIG["data"], "weights": {"a": 1.0, "b": weight}}
    return RunConfig.model_validate({**CONFIG, "run": str(run), "data": data})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of weight 1, at step 3."""
    write_checkpoint(tmp_path / "run", 3)
    record_config(config(tmp_path / "run", 1.0), 0)
    return tmp_path / "run"


def test_a_change_that_came_to_no_checkpoint_is_one_the_next_time_too(run: Path) -> None:
    """Else a run that is killed before its first save would go on with the checkpoint's mixture and say nothing."""
    assert claim_run_folder(config(run, 2.0), ALLOWED) == ["data.weights"]
    record_config(config(run, 2.0), 3)
    assert claim_run_folder(config(run, 2.0), ALLOWED) == ["data.weights"]
    with pytest.raises(ConfigError, match=r"--allow-change data\.weights"):
        claim_run_folder(config(run, 2.0))
    assert claim_run_folder(config(run, 1.0)) == []
    write_checkpoint(run, 4)
    assert claim_run_folder(config(run, 2.0)) == []


def test_the_config_that_made_a_checkpoint_stays_however_often_it_changes_after(run: Path) -> None:
    made = (run / "config.yaml").read_text()
    for weight in (2.0, 3.0):
        record_config(config(run, weight), 3)
    assert (run / "config.until-step-00000003.yaml").read_text() == made


@pytest.mark.parametrize("back_to", [0, 3])
def test_a_config_of_a_checkpoint_that_is_gone_binds_nobody(run: Path, back_to: int) -> None:
    """Of a run that begins anew in its folder, or goes on from an earlier checkpoint, another one gets its name."""
    write_checkpoint(run, 4)
    record_config(config(run, 2.0), 4)
    shutil.rmtree(run / "checkpoints" if back_to == 0 else sharded.path(run, 4))
    record_config(config(run, 2.0), back_to)
    write_checkpoint(run, 4)
    assert claim_run_folder(config(run, 2.0)) == []


def test_an_earlier_checkpoint_is_of_the_config_before_the_change(run: Path) -> None:
    write_checkpoint(run, 4)
    record_config(config(run, 2.0), 4)
    shutil.rmtree(sharded.path(run, 4))
    assert claim_run_folder(config(run, 1.0)) == []
    assert claim_run_folder(config(run, 2.0), ALLOWED) == ["data.weights"]
    record_config(config(run, 2.0), 3)
    assert claim_run_folder(config(run, 2.0), ALLOWED) == ["data.weights"]


def test_a_run_that_is_killed_while_its_config_changes_is_not_locked_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(claim, "save_config", killed)
    with pytest.raises(KeyboardInterrupt):
        record_config(config(run, 2.0), 3)
    assert claim_run_folder(config(run, 2.0), ALLOWED) == ["data.weights"]


@pytest.mark.parametrize("key", ["1", "[]", "x" * 5000, '"a\\nb"'])
def test_a_saved_config_with_strange_keys_is_another_one(run: Path, key: str) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"? {key}\n: 2\n")
    with pytest.raises(ConfigError, match=r"choose another run folder|not YAML") as error:
        claim_run_folder(config(run, 1.0))
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value).replace(str(run), "")) < 300
