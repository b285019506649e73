"""The same tasks on a cluster, through datatrove's Slurm executor."""

from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor

from shear_tron.data.shards import WORK


def run(steps: list[Any], tasks: int, output: str, options: dict[str, Any]) -> None:
    """Submit ``tasks`` array tasks; ``options`` go to the executor. The output folder must be seen by every node."""
    for name in ("partition", "time"):
        if name not in options:
            raise ValueError(
                f"executor=slurm needs slurm.{name}; see datatrove's SlurmPipelineExecutor for all options"
            )
    logs = str(Path(output) / WORK / "slurm")
    SlurmPipelineExecutor(steps, tasks=tasks, logging_dir=logs, skip_completed=False, **options).run()
