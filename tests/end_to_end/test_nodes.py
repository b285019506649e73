"""Two nodes, rehearsed on one machine: two torchrun agents that meet at a c10d rendezvous on the loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import final_state

from shear_tron.train import metrics

pytestmark = pytest.mark.rehearsal


def agents(world: Path, run: Path, nodes: int, each: int, *overrides: str) -> list[subprocess.CompletedProcess[str]]:
    """One torchrun per node, as examples/slurm/train.sbatch starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(each)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "rehearsal"]
    torchrun += ["--local-addr", "localhost", "-m", "shear_tron", "train", str(world / "prune.yaml"), f"run={run}"]
    started = [
        subprocess.Popen(
            [*torchrun, "train.steps=8", *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(nodes)
    ]
    told = [(agent, *agent.communicate(timeout=500)) for agent in started]
    return [subprocess.CompletedProcess(agent.args, agent.returncode, out, err) for agent, out, err in told]


@pytest.mark.parametrize("layout", ["parallel.dp=2", "parallel.tp=2", "parallel.pp=2"])
def test_two_nodes_give_what_one_gives(world: Path, tmp_path: Path, layout: str) -> None:
    two, one = agents(world, tmp_path / "two", 2, 1, layout), agents(world, tmp_path / "one", 1, 2, layout)
    for done in (*two, *one):
        assert done.returncode == 0, done.stderr
    said = [done.stdout for done in two if done.stdout]
    assert len(said) == 1  # the main rank's node, and no other
    assert json.loads(said[0])["held_out"] == json.loads(one[0].stdout)["held_out"]
    assert metrics.headers(tmp_path / "two")[0]["ranks"] == 2
    found, expected = final_state(tmp_path / "two"), final_state(tmp_path / "one")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
