"""prepare on a cluster: datatrove's job scripts, run by a stand-in for Slurm's commands."""

import os
import sys
from pathlib import Path

import pytest

from shear_tron.data import slurm
from shear_tron.data.prepare import DomainSource, PrepareConfig, prepare

from .test_data_prepare import TEXTS, everything, tokenizer, write_jsonl

__all__ = ["tokenizer"]

SBATCH = """#!/bin/bash
# Runs every task of the array at once, in order, as sbatch would later; leaves out the job that merges statistics.
export SLURM_NODELIST=localhost SLURM_CPUS_PER_TASK=1 SLURM_MEM_PER_CPU=2048
script="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
echo "$@" >> "$FAKE_SLURM/submitted"
if grep -q launch_pickled_pipeline "$script" && [ ! -e "$FAKE_SLURM/fail" ]; then
  for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task bash "$script" > "$FAKE_SLURM/$task.log" 2>&1; done
fi
echo "Submitted batch job 4711"
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [ "$1" == -n ] && shift; shift; done
exec "$@"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "commands"
    folder.mkdir()
    commands = {"sbatch": SBATCH, "srun": SRUN, "squeue": "#!/bin/bash\n", "scontrol": "#!/bin/bash\necho localhost\n"}
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setattr(slurm, "POLL", 0.2)
    monkeypatch.setattr(slurm, "GRACE", 0.5)
    return folder


def settings(tmp_path: Path, tokenizer: str, output: str, executor: str) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "output": str(tmp_path / output),
            "tokenizer": tokenizer,
            "domains": {"web": DomainSource(path=str(tmp_path / "a.jsonl"))},
            "separator": "<|endoftext|>",
            "workers": 1,
            "piece_bytes": 30_000,
            "executor": executor,
            "slurm": {"partition": "cpu", "time": "01:00:00"},
        }
    )


@pytest.mark.slow
def test_a_cluster_makes_the_same_bytes(tmp_path: Path, tokenizer: str, cluster: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    local, remote = (prepare(settings(tmp_path, tokenizer, name, name)) for name in ("local", "slurm"))
    assert len(remote.domains["web"].train) == 2
    assert everything(local.folder) == everything(remote.folder)


@pytest.mark.slow
def test_a_job_that_fails_is_told_and_can_be_gone_on_with(tmp_path: Path, tokenizer: str, cluster: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (cluster / "fail").touch()
    with pytest.raises(ValueError, match="slurm job 4711 ended and left tasks undone"):
        prepare(settings(tmp_path, tokenizer, "slurm", "slurm"))
    (cluster / "fail").unlink()
    remote = prepare(settings(tmp_path, tokenizer, "slurm", "slurm"))
    assert everything(remote.folder) == everything(prepare(settings(tmp_path, tokenizer, "local", "local")).folder)


def test_missing_options_and_commands_are_clear(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    given = settings(tmp_path, tokenizer, "slurm", "slurm")
    with pytest.raises(ValueError, match=r"executor=slurm needs slurm\.time"):
        prepare(given.model_copy(update={"slurm": {"partition": "cpu"}}))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="executor=slurm needs the command sbatch"):
        prepare(given)
