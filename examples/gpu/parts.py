"""What a session on a GPU measures, a function a part: each returns rows, and runs small on a CPU too."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_up
import pruning_step
import torch
import yaml
from safetensors.torch import load_file
from shear_kernels import dense_attention, roofline, step_time

from shear_tron import cli
from shear_tron.architecture import Architecture
from shear_tron.model.flops import flops
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, start
from shear_tron.shape import Shape

ROOT = Path(__file__).parents[2]
SHEARED_1_3B = Shape(hidden=2048, layers=24, heads=16, kv_heads=16, head_dim=128, ffn=5504, vocab=32000)
SEVEN_B_WIDE = Shape(hidden=4096, layers=4, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=4096)  # an eighth
TOY = Shape(hidden=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn=48, vocab=64)

Rows = list[dict[str, object]]


class NotHere(Exception):  # noqa: N818  no error
    """A part that cannot be run here, and why."""


@dataclass(frozen=True)
class Session:
    """out: where files go; toy: sizes for a CPU; model, data: SmolLM2-135M and prepared domains."""

    out: Path
    toy: bool
    model: Path
    data: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.toy else torch.device("cuda", 0)


def laws(session: Session) -> Rows:
    """Kernel = definition, compiled (law 8)."""
    command = ["-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
    assert (ROOT / command[-1]).is_dir()
    if session.toy:
        raise NotHere("the laws of a GPU; CI runs them in the interpreter")
    done = _python(*command)
    (session.out / "laws.log").write_text(done.stdout + done.stderr)
    said = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    if done.returncode:
        raise RuntimeError(f"laws do not hold, see laws.log: {' '.join(said)}")
    return [{"pytest": " ".join(said)}]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    where = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=where, capture_output=True, text=True)


def resume(session: Session) -> Rows:
    """A pruning run, and its second half again from the checkpoint in its middle (law 12)."""
    folder = session.out / "resume"
    made_up.model(folder / "model", TOY, 32)
    made_up.data(folder / "data", folder / "model", TOY.vocab, 4000)
    run = folder / "run"
    seen: list[Any] = []
    for _ in range(2):
        _train(session, folder)
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seen.append([line["loss"] for line in log if "loss" in line])
        last = run / "checkpoints" / "step-00000006"
        seen.append({name: x for file in sorted(last.glob("*.safetensors")) for name, x in load_file(file).items()})
        shutil.rmtree(last)  # so that the second time goes on from step 3
    differ = max(abs(a - b) for a, b in zip(seen[0], seen[2], strict=True))
    if differ > 1e-3:
        raise RuntimeError(f"a resumed run's losses differ by {differ}: {seen[0]}, {seen[2]}")
    same = bool(seen[1]) and all(torch.equal(tensor, seen[3][name]) for name, tensor in seen[1].items())
    return [{"steps": 6, "largest difference of losses": differ, "same weights and moments, to the bit": same}]


def _train(session: Session, folder: Path) -> None:
    config = folder / "prune.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run": str(folder / "run"),
                "model": str(folder / "model"),
                "data": {"folder": str(folder / "data"), "sequence": 16, "reference_losses": "source"},
                "prune": {"target": {"hidden": 16, "ffn": 24}, "warmup_steps": 1},
                "train": {"steps": 6, "batch": 4, "device": session.device.type},
                "checkpoint": {"every": 3},
            }
        )
    )
    status = cli.main(["train", str(config)])
    if status:
        raise RuntimeError(f"train ended with status {status}")


def kernels(session: Session) -> Rows:
    """kernels/bench: every kernel against its rivals."""
    command = ["kernels/bench/run.py", "--results", str(session.out / "kernels.csv")]
    assert (ROOT / command[0]).is_file()
    if session.toy:
        raise NotHere("without a GPU the benchmark has nothing to time")
    done = _python(*command)
    (session.out / "kernels.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError("the benchmark failed, see kernels.log")
    return [{"MEASURED": line} for line in done.stdout.splitlines() if "MEASURED" in line]


def dense(session: Session) -> Rows:
    """Training steps of Sheared-LLaMA-1.3B without masks: MFU, memory, next to what the roofline predicts."""
    shape, sequence, batch = (TOY, 16, 1) if session.toy else (SHEARED_1_3B, 4096, 4)
    found = []
    for checkpointing in ("none", "selective"):
        seconds, memory = _dense_step(session, shape, sequence, batch, checkpointing)
        layer = step_time.Layer(shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn)
        parts = step_time.step_parts(batch * sequence, sequence, shape.layers, layer, shape.vocab)
        predicted = sum(map(sum, step_time.milliseconds(step_time.H100, parts).values()))
        work = flops(Architecture(shape), range(shape.layers), True, batch * sequence, sequence)
        found.append({
            "checkpointing": checkpointing, "attention": _attention(session), "ms": round(seconds * 1e3, 2),
            "ms predicted for an H100": round(predicted, 2), "tokens/s": round(batch * sequence / seconds),
            "MFU": round(work / seconds / _peak(session), 4), "peak GiB": round(memory, 2),
        })  # fmt: skip
    return found


def _attention(session: Session) -> str:
    if session.toy:
        return "reference"
    return str(dense_attention.choose(session.device, torch.bfloat16, 128, False, False))


def _peak(session: Session) -> float:
    """FLOP/s by the maker's data sheet; of an H100 where the device is not known."""
    name = "" if session.toy else torch.cuda.get_device_name()
    return next((d.flops for d in roofline.DEVICES if d.name.split()[0] in name), roofline.H100.flops)


def _dense_step(session: Session, shape: Shape, sequence: int, batch: int, checkpointing: str) -> tuple[float, float]:
    """(seconds of forward, backward and AdamW, peak GiB)."""
    device, compute = session.device, torch.float32 if session.toy else torch.bfloat16
    topology = start(Layout(), device)
    stages = build_stages(Architecture(shape, context=sequence), topology, checkpointing)
    stages = [shard(stage, pruning_step.Random(shape), topology, torch.float32, compute) for stage in stages]
    engine = Engine(stages, topology, 1, batch, sequence, compute)
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.parameters()], lr=1e-6, fused=True)
    windows = torch.randint(shape.vocab, (batch, sequence + 1))
    memory, times = pruning_step.Memory(device), []
    for number in range(3 if session.toy else 10):
        if number == 1:
            memory.reset()
        began = time.perf_counter()
        engine.train(windows[:, :-1], windows[:, 1:], None)
        sync.clip(stages, 1.0, topology)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[len(times) // 2 - 1], memory.peak()


def pruning(session: Session) -> Rows:
    """Steps at 7B's widths, an eighth of its layers: dense, masked and compact with gates open, halfway and closed."""
    found: Rows = []
    for batch in (1,) if session.toy else (4, 1):
        shape, sequence = (TOY, 16) if session.toy else (SEVEN_B_WIDE, 4096)
        found += pruning_step.measure(shape, sequence, session.device, 1 if session.toy else 5, batch)
    return found


def shearing(session: Session) -> Rows:
    """SmolLM2-135M pruned to its target by examples/smollm2/prune.yaml, its losses in shearing.jsonl."""
    for wanted in (session.model / "config.json", session.data / "domains.json"):
        if not wanted.exists():
            raise NotHere(f"{wanted} is not there; `make demo` makes it, on any machine")
    run = session.out / "shearing"
    settings = [f"run={run}", f"model={session.model}", f"data.folder={session.data}"]
    if not session.toy:  # what two cores cannot: sequences as long as the paper's, batches of 131,072 tokens
        settings += ["data.sequence=2048", "train.batch=64", "train.micro_batch=16", "train.steps=100"]
        settings += ["prune.warmup_steps=60", "optimizer.schedule=null", f"train.device={session.device.type}"]
    config = ROOT / "examples/smollm2/prune.yaml" if not session.toy else session.model.parent / "prune.yaml"
    status = cli.main(["train", str(config), *settings])
    log = (run / "metrics.jsonl").read_text()
    (session.out / "shearing.jsonl").write_text(log)
    steps = [line for line in map(json.loads, log.splitlines()) if "loss" in line]
    if status:
        raise RuntimeError(f"train ended with status {status}")
    first, last = steps[0], steps[-1]
    return [
        {
            "steps": len(steps), "first loss": first["loss"], "last loss": last["loss"],
            "sparsity": last.get("expected_sparsity"), "target": last.get("target_sparsity"),
            "tokens/s": last["tokens_per_second"],
        }
    ]  # fmt: skip


# In order of value: name -> (part, seconds it may take). Together under 25 minutes.
PARTS: dict[str, tuple[Callable[[Session], Rows], int]] = {
    "laws": (laws, 300),
    "resume": (resume, 120),
    "kernels": (kernels, 420),
    "dense 1.3B": (dense, 180),
    "pruning step": (pruning, 180),
    "shearing": (shearing, 240),
}
