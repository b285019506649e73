"""`make soak`: runs of four processes are killed again and again, resumed, and compared with runs that nobody killed.

A kill is SIGKILL of one rank or of all, at a random moment or in the middle of a checkpoint's file. A run goes on in
its own layout or, in one trial of four, in another. In the same layout the end must be the same to the bit, losses
too; in another one losses may differ by rounding.

    python tests/soak/soak.py --kills 100 --report docs/soak.md
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "end_to_end")]

from conftest import make_world  # noqa: E402

from shear_tron.checkpoint import sharded  # noqa: E402
from shear_tron.train import metrics  # noqa: E402

LAYOUTS = {
    "fsdp4": [],
    "pp2 x dp2": ["parallel.pp=2"],
    "dp2 x tp2": ["parallel.tp=2"],
    "pp2 x tp2": ["parallel.pp=2", "parallel.tp=2"],
}
STEPS = 40
NEAR = 2e-4  # of losses, nats, between layouts: what tests/end_to_end/test_shearing.py allows


def start(world: Path, run: Path, layout: str, background: bool) -> subprocess.Popen[str]:
    settings = [f"run={run}", f"train.steps={STEPS}", "prune.warmup_steps=20", "checkpoint.every=3"]
    settings += [f"checkpoint.background={str(background).lower()}", *LAYOUTS[layout]]
    command = [sys.executable, "-m", "shear_tron", "train", str(world / "prune.yaml"), *settings, "--nproc", "4"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def ranks(parent: int) -> list[int]:
    """Processes below ``parent`` that train."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, above = int(stat.parent.name), int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if above == parent:
            found.append(pid)
    return found


def kill(process: subprocess.Popen[str], run: Path, draw: random.Random, inside_save: bool) -> str | None:
    """Kill the run at a moment of chance. Returns what was killed; None where the run ended before."""
    first, deadline = len(sharded.checkpoints(run)), time.monotonic() + 300
    wanted = draw.randrange(1, 60_000)  # bytes of a file
    while process.poll() is None and time.monotonic() < deadline:
        parts = list((run / sharded.FOLDER).glob("*.partial/*.safetensors")) if run.exists() else []
        try:
            if inside_save and any(part.stat().st_size >= wanted for part in parts):
                break
        except FileNotFoundError:
            continue
        begun = (run / metrics.LOG).exists() and len((run / metrics.LOG).read_text().splitlines()) > 1
        if not inside_save and (begun or len(sharded.checkpoints(run)) > first):
            time.sleep(draw.uniform(0, 6))
            break
        time.sleep(0.0005)
    if process.poll() is not None:
        return None
    below = ranks(process.pid)
    one = draw.random() < 0.5 and below
    for pid in [draw.choice(below)] if one else [*below, process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(timeout=120)
    return f"{'one rank' if one else 'all'} {'inside a save' if inside_save else 'while training'}"


def finish(world: Path, run: Path, layout: str) -> None:
    process = start(world, run, layout, False)
    _, error = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"{layout} does not go on: {error}")


def difference(left: Path, right: Path) -> tuple[bool, float]:
    """Whether all tensors are the same to the bit; the largest difference of a step's loss."""
    one, other = (sharded.Reader(checkpoint) for checkpoint in map(sharded.latest, (left, right)) if checkpoint)
    same = one.sizes == other.sizes and all(torch.equal(one.read(name), other.read(name)) for name in one.sizes)
    pairs = list(zip(metrics.read(left), metrics.read(right), strict=True))
    return same, max(abs(before["loss"] - after["loss"]) for before, after in pairs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=None)
    arguments = parser.parse_args()
    draw, kills, lines = random.Random(arguments.seed), 0, []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "world").mkdir()
        world, never = make_world(Path(place) / "world"), {}
        while kills < arguments.kills:
            layout = list(LAYOUTS)[len(lines) % len(LAYOUTS)]
            if layout not in never:
                never[layout] = Path(place) / f"never-{layout.replace(' ', '')}"
                finish(world, never[layout], layout)
            run, told, now = Path(place) / f"run-{len(lines)}", [], layout
            for _ in range(draw.randrange(1, 4)):
                background = draw.random() < 0.5
                done = kill(start(world, run, now, background), run, draw, inside_save=draw.random() < 0.5)
                if done is None:
                    break
                kills += 1
                told.append(f"{done} ({now})")
                if len(lines) % 4 == 3:
                    now = draw.choice(list(LAYOUTS))
            finish(world, run, now)
            same, apart = difference(never[layout], run)
            moved = any(f"({layout})" not in each for each in told) or now != layout
            good = same or (moved and apart <= NEAR)
            how = "to the bit" if same else f"losses within {apart:.1e}"
            lines.append(f"| {len(lines) + 1} | {layout} | {'; '.join(told)} | {how} | {'yes' if good else '**NO**'} |")
            print(lines[-1], flush=True)
    table = ["| run | layout | kills | end | good |", "|---|---|---|---|---|", *lines]
    summary = f"{kills} kills in {len(lines)} runs; {sum('**NO**' in line for line in lines)} runs ended otherwise."
    print(summary)
    if arguments.report:
        title = (
            f"# Soak\n\n`python tests/soak/soak.py --kills {arguments.kills} --seed {arguments.seed}`: {summary}\n\n"
        )
        arguments.report.write_text(title + "\n".join(table) + "\n")
    sys.exit(any("**NO**" in line for line in lines))


if __name__ == "__main__":
    main()
