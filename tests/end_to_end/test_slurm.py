"""What starts runs on clusters: examples/slurm/train.sbatch on stubs of Slurm's commands, and torchrun's restarts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shear_tron.checkpoint import sharded
from shear_tron.train import metrics

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"
STUBS = {
    "srun": 'shift\n"$@" &\necho $! > "$STUBS/step"\nwait $!',
    # To every process of the step, as Slurm does.
    "scancel": 'tree() { echo "$1"; for child in $(pgrep -P "$1"); do tree "$child"; done; }\n'
    'kill "-${1#--signal=}" $(tree "$(cat "$STUBS/step")")\necho "$@" >> "$STUBS/told"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "scontrol $*" >> "$STUBS/told"; fi',
    "torchrun": 'exec {python} -m torch.distributed.run "${{@//29500/$PORT}}"',
}


@pytest.mark.rehearsal
def test_a_warned_job_saves_and_queues_itself_again(world: Path, tmp_path: Path) -> None:
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, body in STUBS.items():
        (stubs / name).write_text(
            f"#!/bin/bash\n{body.format(python=sys.executable) if name == 'torchrun' else body}\n"
        )
        (stubs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PATH": f"{stubs}:{os.environ['PATH']}", "STUBS": str(stubs), "PORT": str(port),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip
    settings = [f"run={tmp_path}/run", "train.steps=5000", "checkpoint.every=0"]
    job = subprocess.Popen(
        ["bash", str(SCRIPT), str(world / "prune.yaml"), *settings], stderr=subprocess.PIPE, text=True, env=environment
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    try:
        _, said = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 0, said
    assert "stopped by SIGUSR1; step" in said
    assert "resume with: torchrun ... shear-tron train" in said
    assert len(sharded.checkpoints(tmp_path / "run")) == 1
    assert (stubs / "told").read_text().splitlines() == ["--signal=USR1 7", "scontrol requeue 7"]


# The command line on each rank of torchrun; in the first attempt rank 1 is killed before step 3.
KILLED_ONCE = """
import os, signal, sys
from shear_tron import cli
from shear_tron.train.loop import Trainer
update = Trainer._update
def killed(self, batches):
    if self.step == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batches)
Trainer._update = killed
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.rehearsal
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(world: Path, tmp_path: Path) -> None:
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    settings = [f"run={tmp_path}/run", "train.steps=4", "prune.warmup_steps=3", "checkpoint.every=1"]
    done = subprocess.run(
        [*command, str(tmp_path / "killed_once.py"), "train", str(world / "prune.yaml"), *settings],
        capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [sharded.step_of(found) for found in sharded.checkpoints(tmp_path / "run")] == [3, 4]
    assert [header["from_step"] for header in metrics.headers(tmp_path / "run")] == [0, 2]
