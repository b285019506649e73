"""Stopped, killed or broken on any rank: what was done is kept, and the user hears why, once."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from ranks import run
from runs import as_under_torchrun

from shear_tron import cli
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.remote import Remote
from shear_tron.train import metrics
from shear_tron.train.loop import Trainer
from shear_tron.train.stopping import Signals

STEPS = ["train.steps=8", "prune.warmup_steps=4", "checkpoint.every=0"]
TIMING = ("seconds", "data_seconds", "seconds_to_dense", "tokens_per_second", "tflops_per_rank", "peak_memory", "time")

# Runs the command line on each rank of torchrun, with a fault on rank 1 before step 3.
FAULTY = """
import os, signal, sys
from shear_tron import cli
from shear_tron.train.loop import Trainer
update = Trainer._update
def faulty(self, batches):
    if self.step == 2 and os.environ["RANK"] == "1":
        {fault}
    return update(self, batches)
Trainer._update = faulty
sys.exit(cli.main(sys.argv[1:]))
"""


def interrupt(number: int, rank: int = 0) -> None:
    """Before step 3 a rank sends itself a signal."""
    import torch.distributed as dist

    update = Trainer._update

    def signalled(self: Trainer, batches: Any) -> dict[str, Any]:
        if self.step == 2 and dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        return update(self, batches)

    Trainer._update = signalled  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def never(world: Path) -> Path:
    """A run that nobody stopped."""
    assert cli.main(["train", str(world / "prune.yaml"), f"run={world}/never", *STEPS]) == 0
    return world / "never"


def test_ctrl_c_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with Signals() as signals:
        signals.remember(tell=True)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as launchers do, and too soon to be a second Ctrl-C
    assert signals.asked == signal.SIGINT
    told = "shear-tron train: ending this step, then saving; Ctrl-C again leaves at once"
    assert capfd.readouterr().err.split("\n") == ["", told, ""]


def test_ctrl_c_counts_where_nobody_reads_the_answer() -> None:
    """In `train ... 2>&1 | tee log` it ends tee first."""
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.dup(2)
    os.dup2(writer, 2)
    try:
        with Signals() as signals:
            signals.remember(tell=True)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.dup2(stderr, 2)
    assert signals.asked == signal.SIGINT


def test_an_error_that_nobody_foresaw_is_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Trainer, batches: Any) -> dict[str, Any]:
        raise KeyError("spanner")

    monkeypatch.setattr(Trainer, "_update", broken)
    arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *STEPS]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    found = re.search(r"shear-tron train: 'spanner' \(KeyError\); (\S+) says where, as does --debug\n$", error)
    assert found
    assert "Traceback" not in error
    assert "in broken" in Path(found[1]).read_text()
    Path(found[1]).unlink()


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in metrics.read(folder)]


def same_state(left: Path, right: Path) -> bool:
    import torch

    one, other = (sharded.Reader(found) for found in (sharded.latest(left), sharded.latest(right)) if found)
    return one.sizes == other.sizes and all(torch.equal(one.read(name), other.read(name)) for name in one.sizes)


@pytest.mark.parametrize(
    ("number", "status", "background"),
    [(signal.SIGTERM, 143, "false"), (signal.SIGINT, 130, "true"), (signal.SIGUSR1, 143, "true")],
)
def test_a_signal_saves_and_the_run_goes_on_to_the_bit(
    never: Path,
    world: Path,
    tmp_path: Path,
    number: signal.Signals,
    status: int,
    background: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "train",
        str(world / "prune.yaml"),
        f"run={tmp_path}/run",
        *STEPS,
        f"checkpoint.background={background}",
    ]
    flags = ["--allow-change=optimizer.clip", "--strict"]
    before = signal.getsignal(number)
    monkeypatch.setattr(Trainer, "_update", Trainer._update)  # restored afterwards
    interrupt(number)
    assert cli.main([*arguments, *flags]) == status
    error = capsys.readouterr().err
    assert " ".join(flags) in error.partition("resume with: ")[2]
    assert f"stopped by {number.name}; step 3 of 8 is saved in {tmp_path}/run; resume with: shear-tron train" in error
    assert "Traceback" not in error
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    assert cli.main(arguments) == 0
    assert same_state(never, tmp_path / "run")
    assert untimed(never) == untimed(tmp_path / "run")


def on_ranks(config: str, overrides: list[str]) -> int:
    as_under_torchrun()
    interrupt(signal.SIGTERM, rank=1)
    return cli.main(["train", config, *overrides])


def test_ranks_stop_together(world: Path, tmp_path: Path) -> None:
    """One rank hears of it."""
    for layout in (["parallel.pp=2"], ["parallel.tp=2"]):
        folder = tmp_path / layout[0]
        assert run(2, on_ranks, str(world / "prune.yaml"), [f"run={folder}", *STEPS, *layout]) == [143, 143]
        assert [found.name for found in sharded.checkpoints(folder)] == ["step-00000003"]


def test_a_run_saves_by_the_clock(world: Path, tmp_path: Path) -> None:
    clock = ["checkpoint.minutes=1e-6", "checkpoint.keep=2", "checkpoint.keep_every=3"]
    assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *STEPS, *clock]) == 0
    assert [sharded.step_of(found) for found in sharded.checkpoints(tmp_path / "run")] == [3, 6, 7, 8]


def torchrun(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "faulty.py").write_text(script)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    return subprocess.run(
        [*command, str(folder / "faulty.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise FileNotFoundError(2, 'No such file or directory', 'tokens.ds')", "rank 1: [Errno 2] No such file"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 0: rank 1 does not answer: it was killed"),
        ("import time; time.sleep(60)", "rank 0: rank 1 does not answer: it was killed"),
    ],
    ids=["error", "killed", "stuck"],
)
def test_an_error_of_any_rank_is_told_once(world: Path, tmp_path: Path, fault: str, reason: str) -> None:
    plain = ["prune=null", "data.update_every=0", "data.reference_losses=null", "checkpoint.every=1"]
    layout = ["parallel.timeout=5"] if "sleep" in fault else ["parallel.pp=2"]  # pipelines wrap errors of their peers
    arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *plain, *layout]
    ended = torchrun(FAULTY.format(fault=fault), tmp_path, *arguments)
    ours = [line for line in ended.stderr.splitlines() if "shear-tron train: " in line]
    assert len(ours) == 1, ended.stderr
    assert reason in ours[0]
    assert ended.returncode != 0
    assert "sampler" not in ended.stderr  # no traceback of ours
    assert [found.name for found in sharded.checkpoints(tmp_path / "run")][-1] == "step-00000002"
    if "answer" in reason:
        assert f"the last collectives: {tmp_path}/run/flight-recorder" in ours[0]
        assert json.loads((tmp_path / "run" / "flight-recorder" / "rank-0.json").read_text())["entries"]


def test_a_run_folder_is_one_run_at_a_time(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *STEPS]
    second: list[subprocess.CompletedProcess[str]] = []
    update = Trainer._update

    def meanwhile(self: Trainer, batches: Any) -> dict[str, Any]:
        if self.step == 1:
            command = [sys.executable, "-m", "shear_tron", *arguments]
            second.append(subprocess.run(command, capture_output=True, text=True, timeout=120))
        return update(self, batches)

    monkeypatch.setattr(Trainer, "_update", meanwhile)
    assert cli.main(arguments) == 0
    assert second[0].returncode == 1
    assert f"{tmp_path}/run is in use by another process (process {os.getpid()} on" in second[0].stderr


def test_tokens_outside_the_vocabulary_are_refused_in_any_layout(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    for shard in (tmp_path / "data").rglob("train/*.ds"):
        tokens = np.fromfile(shard, dtype="<u2")
        tokens[:] = 65000
        tokens.tofile(shard)
    for layout in (["parallel.tp=2"], []):
        overrides = [f"run={tmp_path}/run", f"data.folder={tmp_path}/data", *STEPS, *layout]
        assert run(2, on_ranks, str(world / "prune.yaml"), overrides) == [1, 1]


def test_a_disk_that_fills_up_in_the_middle_of_a_file_loses_nothing(
    never: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As seen by a process whose files may not grow beyond a limit: a write fails where a full disk would fail it."""
    import resource

    from shear_tron.checkpoint.checkpointer import Checkpointer

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpointer.save

    def full(self: Checkpointer, step: int, *rest: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if step == 4 else soft, hard))
        try:
            save(self, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Checkpointer, "save", full)
    arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *STEPS, "checkpoint.every=2"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "step 4 is not saved: rank 0: " in error
    assert "File too large" in error
    assert "Traceback" not in error
    assert [found.name for found in sharded.checkpoints(tmp_path / "run")] == ["step-00000002"]
    monkeypatch.undo()
    assert cli.main(arguments) == 0
    assert same_state(never, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


@pytest.fixture
def elsewhere() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's file system in memory, empty; its root is ``memory://bucket``."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_a_run_whose_folder_is_lost_goes_on_from_its_copy_to_the_bit(
    never: Path,
    world: Path,
    tmp_path: Path,
    elsewhere: fsspec.AbstractFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upload = ["checkpoint.upload=memory://bucket/run", "checkpoint.background=true", "checkpoint.every=2"]
    arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *STEPS, *upload]
    monkeypatch.setattr(Trainer, "_update", Trainer._update)  # restored afterwards
    interrupt(signal.SIGTERM)
    assert cli.main(arguments) == 143
    assert Remote("memory://bucket/run").steps() == [2, 3]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run")
    elsewhere.pipe_file("/bucket/run/checkpoints/step-00000009/shard-00001-model-00001-of-00001.safetensors", b"half")
    (sent,) = elsewhere.glob("/bucket/run/checkpoints/step-00000003/*.safetensors")
    good = elsewhere.cat_file(sent)
    elsewhere.pipe_file(sent, good[:-1] + bytes([good[-1] ^ 1]))
    capsys.readouterr()
    assert cli.main(arguments) == 2
    assert "memory://bucket/run cannot be fetched from: " in (error := capsys.readouterr().err)
    assert "does not have its sha256" in error
    elsewhere.pipe_file(sent, good)
    assert cli.main([*arguments, "train.seed=3"]) == 2  # another run may not take it
    assert "fetched step 3 from memory://bucket/run" in capsys.readouterr().err
    assert cli.main([*arguments, "checkpoint.keep_every=4"]) == 0
    assert same_state(never, tmp_path / "run")
    assert untimed(never) == untimed(tmp_path / "run")
    assert Remote("memory://bucket/run").steps() == [4, 6, 8]


@pytest.mark.rehearsal
def test_ranks_send_their_own_files(never: Path, world: Path, tmp_path: Path) -> None:
    settings = [f"run={tmp_path}/run", *STEPS, f"checkpoint.upload=file://{tmp_path}/copy"]
    assert run(2, on_ranks, str(world / "prune.yaml"), settings) == [143, 143]
    assert cli.main(["verify", f"{tmp_path}/copy"]) == 0
    shutil.rmtree(tmp_path / "run")
    assert cli.main(["train", str(world / "prune.yaml"), *settings]) == 0  # in another layout
    for one, other in zip(untimed(never), untimed(tmp_path / "run"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-4)


def test_a_run_goes_on_where_its_copy_cannot_be_written(
    world: Path, tmp_path: Path, elsewhere: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("403: no key\nfor this")

    monkeypatch.setattr(type(elsewhere), "put_file", refuse)
    arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", "train.steps=2", "prune.warmup_steps=1"]
    assert cli.main([*arguments, "checkpoint.upload=memory://bucket/run"]) == 0
    (told,) = [record.message for record in caplog.records if "was not sent" in record.message]
    assert told.startswith("step 2 was not sent to memory://bucket/run: rank 0: 403: no key for this; it is in ")
