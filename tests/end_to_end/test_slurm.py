"""examples/slurm/train.sbatch on stubs of Slurm's commands: warned, the ranks save, and the job queues itself again."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shear_tron.checkpoint import sharded

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
