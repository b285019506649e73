"""The same tasks on a cluster, through datatrove's Slurm executor."""

import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor

from shear_tron.data.shards import WORK

POLL = 10.0  # seconds between looks at the queue
GRACE = 60.0  # seconds a network file system may take to show what the last task wrote


def run(steps: list[Any], tasks: int, output: str, options: dict[str, Any], finished: threading.Event) -> None:
    """Submit an array of ``tasks`` and wait for it. ``options`` go to datatrove's executor; every node must see the
    output folder and have this package. Raises ValueError when an option is missing or the job leaves tasks undone."""
    for name in ("partition", "time"):
        if name not in options:
            raise ValueError(
                f"executor=slurm needs slurm.{name}; see datatrove's SlurmPipelineExecutor for all options"
            )
    logs = tempfile.mkdtemp(dir=Path(output).absolute() / WORK, prefix="slurm.")  # one a submission: ranks change
    executor = SlurmPipelineExecutor(steps, tasks=tasks, logging_dir=logs, skip_completed=False, **options)
    try:
        executor.run()
    except FileNotFoundError as error:
        raise ValueError(
            f"executor=slurm needs the command {error.filename}; run it where jobs are submitted"
        ) from None
    while not finished.wait(POLL):
        if not _queued(executor.job_id) and not finished.wait(GRACE):
            raise ValueError(
                f"slurm job {executor.job_id} ended and left tasks undone; see {logs}, then run prepare "
                "again: it does what is missing"
            )


def _queued(job: str) -> bool:
    queue = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True, check=False)
    return queue.returncode == 0 and bool(queue.stdout.strip())
