"""`train --nproc`: ranks without torchrun, and one line where something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shear_tron.parallel import topology
from shear_tron.parallel.launch import launch
from shear_tron.parallel.topology import Layout
from shear_tron.train.session import FAILED, _tell


def train(world: Path, run: Path, *overrides: str, nproc: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shear_tron", "train", str(world / "prune.yaml"), f"run={run}", *overrides]
    return subprocess.run([*command, "--nproc", str(nproc)], capture_output=True, text=True, check=False, timeout=300)


def test_two_ranks_train(world: Path, tmp_path: Path) -> None:
    done = train(world, tmp_path / "run", "train.steps=8")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["held_out"]) == {"colours", "numbers", "trees"}
    assert (tmp_path / "run" / "checkpoints" / "step-00000008").exists()
    said = done.stderr
    assert "\r" not in said
    assert re.search(r"pruning [\d,]+ -> [\d,]+ parameters: 8 steps, 1,024 tokens, on 2 ranks \(pp 1 x dp 2", said)
    waits = ("losses at step 0", "timing dense steps", "losses at step 4", "saving step 5", "final losses")
    for wait in (f"reading {world}/model", *waits, "saving step 8"):
        assert f"{wait}: " in said
    assert f"next: shear-tron extract {tmp_path}/run models/small" in said


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
    assert capfd.readouterr().err == ""


def _one_fails_in_a_run(run: str) -> int:
    """Another, which need not say anything, ends before it."""
    plan: Any = SimpleNamespace(config=SimpleNamespace(run=run), layout=Layout(shard=2))
    ranks = topology.start(plan.layout, torch.device("cpu"))
    if ranks.is_main:
        time.sleep(1)
        return FAILED
    try:
        raise KeyError("spanner")
    except KeyError as error:
        return _tell(error, plan)
    finally:
        time.sleep(3)


def test_an_error_that_nobody_foresaw_is_told_whichever_rank_ends_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(2, torch.device("cpu"), _one_fails_in_a_run, str(tmp_path)) == FAILED
    (said,) = capfd.readouterr().err.splitlines()
    found = re.fullmatch(r"shear-tron train: rank 1: 'spanner' \(KeyError\); (\S+) says where", said)
    assert found
    assert "in _one_fails_in_a_run" in Path(found[1]).read_text()
    Path(found[1]).unlink()


def _all_stopped() -> int:
    return 128 + signal.SIGINT


def test_ranks_that_said_why_they_ended_are_not_spoken_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, torch.device("cpu"), _all_stopped) == 130
    assert capfd.readouterr().err == ""


def _one_is_killed() -> int:
    if int(os.environ["RANK"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_rank_that_could_say_nothing_is_spoken_for() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed: Signal 9 \(SIGKILL\) received by PID \d+"):
        launch(2, torch.device("cpu"), _one_is_killed)


CRASH = """
import os, signal, torch
from shear_tron.parallel.topology import Layout, start
def step():
    os.kill(os.getpid(), signal.SIGSEGV)
start(Layout(), torch.device("cpu"))
step()
"""


def test_a_rank_that_dies_in_native_code_says_where_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.startswith("Fatal Python error: Segmentation fault")
    assert "in step" in done.stderr


def test_a_launcher_that_is_told_to_end_tells_its_ranks(world: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shear_tron", "train", str(world / "prune.yaml"), f"run={tmp_path}/run"]
    running = subprocess.Popen([*command, "train.steps=5000", "--nproc", "2"], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert running.poll() is None
        time.sleep(0.1)
    running.terminate()
    _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert "death signal" not in said
