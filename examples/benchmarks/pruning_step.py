"""Speed and memory of a pruning step: dense, masked and compact, interleaved in one run.

    python examples/benchmarks/pruning_step.py [--rounds 3]

A LLaMA-shaped model of random weights with target ratios of 7B -> 1.3B (heads, intermediate, hidden 1/2, layers 3/4),
gates all open, halfway and closed as late training leaves them: a closed unit opens with 5 % chance, an open one closes
with 0.2 %. A step is everything that training does: sampling, forward, backward, mask gradients, clipping, AdamW. The
vocabulary is small, so that the head weighs what it weighs in 7B. Rows are appended to pruning_step.csv beside this
script. On the CPU: 4 layers of hidden 1024, 4 x 1024 tokens, about five minutes on two cores; on CUDA: 4 layers of
hidden 4096, 4 x 4096 tokens, bfloat16.
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from shear_tron.architecture import Architecture
from shear_tron.model.flops import flops
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, Topology, start
from shear_tron.params import by_leaf
from shear_tron.pruning.config import PruneConfig, TargetConfig
from shear_tron.pruning.gates import LIMIT
from shear_tron.shape import Shape
from shear_tron.train.pruner import Pruner

ROWS = Path(__file__).with_suffix(".csv")
SHAPES = {
    "cpu": (Shape(hidden=1024, layers=4, heads=16, kv_heads=16, head_dim=64, ffn=2752, vocab=1024), 1024),
    "cuda": (Shape(hidden=4096, layers=4, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=4096), 4096),
}
BATCH = 4
CLOSED = {"open": 0.0, "halfway": 0.5, "closed": 1.0}  # share of the target's sparsity reached
KINDS = ("dense", "masked", "compact")


class Random:
    """Weights of a model that nobody trained."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(0)

    def read(self, name: str) -> torch.Tensor:
        size = by_leaf(Architecture(self.shape))[name.rsplit(".", 1)[-1]].size(self.shape)
        return torch.ones(size) if "norm" in name else torch.randn(size, generator=self.generator) * 0.02

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self.read(name).narrow(axis, start, stop - start)


def halves(shape: Shape) -> TargetConfig:
    """The target of 7B -> 1.3B, in proportion."""
    return TargetConfig(
        hidden=shape.hidden // 2,
        layers=shape.layers * 3 // 4,
        heads=shape.heads // 2,
        kv_heads=shape.kv_heads // 2,
        ffn=shape.ffn // 2,
    )


def pruner(kind: str, closed: float, shape: Shape, topology: Topology) -> Pruner:
    """Gates of which ``closed`` of the units to be pruned, scattered, are closed, as far as gates ever close."""
    config = PruneConfig(target=halves(shape), warmup_steps=1, compact=kind == "compact")
    made = Pruner(Architecture(shape), halves(shape).shape(shape), config, 0, topology)
    noise = torch.Generator().manual_seed(1)
    for name, logits in made.method.gates.logits.items():
        units = logits.shape[-1]
        order = torch.rand(logits.shape, generator=noise).argsort(-1).argsort(-1)
        shut = order < round(closed * (units - made.method.gates.counts[name]))
        logits.data = torch.where(shut, -LIMIT, LIMIT)
    return made


class Memory:
    """The most memory held since the last ``reset``, in GiB: of the device, or resident for the CPU (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    save(measure(*SHAPES[device.type], device, parser.parse_args().rounds))


def measure(
    shape: Shape, sequence: int, device: torch.device, rounds: int, batch: int = BATCH
) -> list[dict[str, object]]:
    """A row for each setting of the gates and kind of step, after ``rounds`` in turn."""
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    topology = start(Layout(), device)
    stages = build_stages(Architecture(shape, context=sequence), topology, "none")
    stages = [shard(stage, Random(shape), topology, torch.float32, compute) for stage in stages]
    engine = Engine(stages, topology, 1, batch, sequence, compute)
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.parameters()], lr=1e-6, fused=True)
    windows = torch.randint(shape.vocab, (batch, sequence + 1), generator=torch.Generator().manual_seed(2)).to(device)
    memory = Memory(device)

    def step(by: Pruner | None, number: int) -> tuple[float, float, float]:
        """(seconds, operations next to dense, peak GiB) of a step with ``by``'s masks; None: dense."""
        memory.reset()
        began = time.perf_counter()
        drawn = by.sample(number, range(1)) if by else None
        engine.train(windows[:, :-1], windows[:, 1:], drawn)
        if by and drawn:
            by.backward(number, drawn)
        sync.clip(stages, 1.0, topology)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        tokens, layers = batch * sequence, range(shape.layers)
        keep = drawn.gated[0].keep if drawn else None
        done = flops(Architecture(shape), layers, True, tokens, sequence, keep)
        return seconds, done / flops(Architecture(shape), layers, True, tokens, sequence), memory.peak()

    pruners = {
        (level, kind): None if kind == "dense" else pruner(kind, closed, shape, topology)
        for level, closed in CLOSED.items()
        for kind in KINDS
    }
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {place: [] for place in pruners}
    step(None, 0)  # warms up, and makes the optimizer's state
    for number in range(rounds):
        for level in CLOSED:
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:  # each comes first, second and last
                found[level, kind].append(step(pruners[level, kind], number))
                print(f"round {number + 1} {level:8} {kind:8} {found[level, kind][-1][0]:7.2f} s", flush=True)
    return rows(found, shape, batch * sequence, device)


def rows(
    found: dict[tuple[str, str], list[tuple[float, float, float]]], shape: Shape, tokens: int, device: torch.device
) -> list[dict[str, object]]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROWS.parent)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    made: list[dict[str, object]] = []
    for (level, kind), steps in found.items():
        seconds, shares, peaks = zip(*steps, strict=True)
        median, dense = statistics.median(seconds), statistics.median([s for s, _, _ in found[level, "dense"]])
        made.append({
            "device": where, "hidden": shape.hidden, "layers": shape.layers, "tokens": tokens, "gates": level,
            "step": kind, "seconds": round(median, 4), "fastest": round(min(seconds), 4),
            "slowest": round(max(seconds), 4), "tokens_per_second": round(tokens / median, 1),
            "speed_to_dense": round(dense / median, 3), "flops_to_dense": round(statistics.mean(shares), 4),
            "peak_gib": round(max(peaks), 3), "rounds": len(steps), "torch": torch.__version__,
            "python": platform.python_version(), "commit": commit.stdout.strip(),
            "date": datetime.date.today().isoformat(),
        })  # fmt: skip
    return made


def save(made: list[dict[str, object]]) -> None:
    """Print the rows and append them to pruning_step.csv."""
    print(f"\n{'gates':8} {'step':8} {'tokens/s':>9} {'x dense':>8} {'FLOPs':>6} {'peak GiB':>9}")
    for row in made:
        print(
            f"{row['gates']:8} {row['step']:8} {row['tokens_per_second']:9.0f} {row['speed_to_dense']:8.2f} "
            f"{row['flops_to_dense']:6.2f} {row['peak_gib']:9.2f}"
        )
    header = not ROWS.exists()
    with ROWS.open("a") as file:
        writer = csv.DictWriter(file, made[0], lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(made)


if __name__ == "__main__":
    main()
