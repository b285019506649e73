"""`train --nproc`: ranks without torchrun, and one line where something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shear_tron.parallel import topology
from shear_tron.parallel.launch import launch
from shear_tron.parallel.topology import Layout


def train(world: Path, run: Path, *overrides: str, nproc: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shear_tron", "train", str(world / "prune.yaml"), f"run={run}", *overrides]
    return subprocess.run([*command, "--nproc", str(nproc)], capture_output=True, text=True, check=False, timeout=300)


def test_two_ranks_train(world: Path, tmp_path: Path) -> None:
    done = train(world, tmp_path / "run", "train.steps=8")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["held_out"]) == {"colours", "numbers", "trees"}
    assert (tmp_path / "run" / "checkpoints" / "step-00000008").exists()


def test_a_layout_that_does_not_fit_is_said_once_and_starts_nothing(world: Path, tmp_path: Path) -> None:
    done = train(world, tmp_path / "run", "parallel.tp=3", nproc=3)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["shear-tron train: kv_heads=4 does not split over tp=3; use tp of 1, 2, 4"]


def _one_fails() -> int:
    topology.start(Layout(shard=2), torch.device("cpu"))
    if topology.is_main_process():
        torch.distributed.barrier()  # waits for a rank that is gone, and fails too, later
    raise KeyError("spanner")


def test_the_rank_that_failed_first_is_named_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed: KeyError: 'spanner'") as failed:
        launch(2, torch.device("cpu"), _one_fails)
    assert "in _one_fails" in failed.value.__notes__[0]
    assert "Traceback" not in capfd.readouterr().err
