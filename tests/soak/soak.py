"""`make soak`: runs of four processes meet faults again and again, go on, and are compared with runs that met none.

A kill is SIGKILL of one rank or of all: at a random time, or at a point where a rank touches the disk (``faults.py``),
most of them in the middle of a checkpoint's file. A run goes on in its own layout or, in one run of four, in others.
Beside that, the disk is full at every write of a run, from there on, for all ranks. In the same layout the end must be
the same to the bit, losses too; in another one weights may differ by 1e-6.

Rows are appended as they are made, so it goes on where it stopped:

    python tests/soak/soak.py --kills 100 --slice 10 --report docs/soak.md
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "end_to_end"), str(ROOT / "tests" / "soak")]

import torch  # noqa: E402
from conftest import make_world  # noqa: E402
from faults import DIE, DIE_ALL, FULL, Fault, rank  # noqa: E402

from shear_tron.checkpoint import sharded  # noqa: E402
from shear_tron.train import metrics  # noqa: E402

LAYOUTS = {
    "fsdp4": [],
    "pp2 x dp2": ["parallel.pp=2"],
    "dp2 x tp2": ["parallel.tp=2"],
    "pp2 x tp2": ["parallel.pp=2", "parallel.tp=2"],
}
RANKS = 4
SETTINGS = ["train.steps=8", "prune.warmup_steps=6", "checkpoint.every=2", "parallel.timeout=60"]
SETTINGS += ["train.batch=4", "data.evaluate_windows=2"]  # few messages: ranks share cores
SHORT = ["train.steps=4", "prune.warmup_steps=3"]  # where every write is tried
NEAR = 1e-6  # of weights, between layouts
# For that, of runs that move: with Adam's usual 1e-8 a weight whose gradient is little more than rounding moves by its
# sign, and two runs that nobody disturbed end up to 2.4e-5 apart, one with tensor parallelism and one without.
MOVING = ["optimizer.eps=1e-3"]
LATE = 300  # seconds after which a rank hangs

# Ranks come from a server that has imported everything: a second for four of them instead of twenty.
PRELOADED = ["torch", "faults", "shear_tron.cli", "shear_tron.train.session", "shear_tron.train.plan"]
CONTEXT = multiprocessing.get_context("forkserver")


class Run:
    """Four ranks of one start of a run."""

    def __init__(self, place: Path, run: Path, settings: list[str], fault: Fault | None = None) -> None:
        self.shared = place / "shared"
        self.shared.mkdir(exist_ok=True)
        for left in self.shared.iterdir():
            left.unlink()
        # As under torchrun, the ranks meet in a store that does not die with one of them.
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port
        arguments = ["train", str(place / "world" / "prune.yaml"), f"run={run}", *SETTINGS, *settings]
        self.ranks = [
            CONTEXT.Process(target=rank, args=(number, RANKS, port, str(run), arguments, fault, str(self.shared)))
            for number in range(RANKS)
        ]
        for process in self.ranks:
            process.start()

    def end(self, seconds: float = LATE) -> list[int]:
        """Wait for all ranks; their exit statuses. A rank that hangs ends the soak."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.is_alive() for process in self.ranks):
            for process in self.ranks:
                process.kill()
            raise SystemExit(f"a rank hangs; it said: {self.said()}")
        return [int(process.exitcode or 0) for process in self.ranks]

    def kill(self, one: int | None) -> bool:
        """SIGKILL one rank or all. Whether any was still at it."""
        chosen = self.ranks if one is None else [self.ranks[one]]
        alive = [process for process in chosen if process.is_alive()]
        for process in alive:
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
        return bool(alive)

    def said(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.shared.glob("said-*")))

    def ours(self) -> list[str]:
        """What the ranks said of an error; progress bars left out. SystemExit where there is a traceback."""
        if "Traceback" in self.said():
            raise SystemExit(f"a traceback: {self.said()}")
        lines = self.said().replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith("shear-tron train: ") and "next: shear-tron" not in line]

    def points(self, number: int) -> list[str]:
        """What a rank did to the disk."""
        return (self.shared / f"points-{number}").read_text().splitlines()

    def killed_at(self) -> str | None:
        file = self.shared / "killed"
        return file.read_text() if file.exists() else None


def fresh(run: Path) -> Path:
    """A folder without what a soak that was stopped left there."""
    shutil.rmtree(run, ignore_errors=True)
    return run


def finish(place: Path, run: Path, settings: list[str]) -> Run:
    done = Run(place, run, settings)
    if any(done.end()):
        raise SystemExit(f"{run} does not go on with {settings}: {done.said()}")
    return done


def undisturbed(place: Path, layout: str, settings: list[str]) -> tuple[Path, float]:
    """A run that met no fault, and the seconds it took. Made once."""
    run = place / f"never-{layout.replace(' ', '')}-{len(settings)}"
    times = run.with_suffix(".json")
    if not times.exists():
        start = time.monotonic()
        finish(place, run, [*LAYOUTS[layout], *settings])
        times.write_text(json.dumps(time.monotonic() - start))
    return run, json.loads(times.read_text())


def difference(left: Path, right: Path) -> dict[str, float]:
    """The largest differences of weights, of everything else in a checkpoint, and of a step's loss."""
    one, other = (sharded.Reader(found) for found in map(sharded.latest, (left, right)) if found)
    assert one.sizes == other.sizes
    found = {"weights": 0.0, "rest": 0.0}
    for name in one.sizes:
        kind = "rest" if name.startswith(("adam.", "gates.", "multipliers.")) else "weights"
        here, there = one.read(name).double(), other.read(name).double()
        found[kind] = max(found[kind], float((here - there).abs().max()))
    pairs = list(zip(metrics.read(left), metrics.read(right), strict=True))
    return found | {"loss": max(abs(before["loss"] - after["loss"]) for before, after in pairs)}


def kill(place: Path, run: Path, layout: str, extra: list[str], seconds: float, draw: random.Random) -> str | None:
    """Start the run, kill it. Returns what was killed, where; None where it came to its end before."""
    settings = [*LAYOUTS[layout], *extra, f"checkpoint.background={str(draw.random() < 0.5).lower()}"]
    one = draw.random() < 0.5
    number = draw.randrange(RANKS)
    told = f"rank {number}" if one else "all"
    if draw.random() < 0.65:  # inside a save or a line of a log
        only = draw.choice(["write of shard", "write of shard", "fsync", "write of progress", "re", "write of metr"])
        number = number if only in ("write of shard", "fsync") else 0
        fault = Fault(number, draw.randrange(3), DIE if one else DIE_ALL, only)
        running = Run(place, run, settings, fault)
        running.end()
        where = running.killed_at()
        if where is None:
            return None
        running.ours()
        half = "in the middle of a " if where.startswith("write") else "before the "
        return f"{f'rank {number}' if one else 'all'} {half}{where} ({layout})"
    begin = len(metrics.read(run)) if (run / metrics.LOG).exists() else 0
    running = Run(place, run, settings)
    if one:  # before ranks have met, the others wait for as long as they are told to
        deadline = time.monotonic() + LATE
        while time.monotonic() < deadline and any(process.is_alive() for process in running.ranks):
            if (run / metrics.LOG).exists() and len(metrics.read_lines(run / metrics.LOG)) > begin + 1:
                break
            time.sleep(0.01)
    time.sleep(draw.uniform(0, seconds * (0.6 if one else 0.9)))
    hit = running.kill(number if one else None)
    running.end()
    running.ours()
    return f"{told} at a random time ({layout})" if hit else None


def killed_run(place: Path, number: int, most: int, seed: int) -> dict[str, Any]:
    """Run number ``number``: some kills, then to its end. A row of the report."""
    draw = random.Random(f"{seed} {number}")
    layout = now = list(LAYOUTS)[number % len(LAYOUTS)]
    moves = number // len(LAYOUTS) % len(LAYOUTS) == number % len(LAYOUTS)  # one run of four, each layout in its turn
    extra = MOVING if moves else []
    never, seconds = undisturbed(place, layout, extra)
    run, kills = fresh(place / f"run-{number}"), []
    for _ in range(min(most, draw.randrange(1, 6))):
        if moves and kills:
            now = draw.choice([other for other in LAYOUTS if other != now])
        done = kill(place, run, now, extra, seconds, draw)
        if done is None:
            break
        kills.append(done)
    if moves and kills:
        now = draw.choice([other for other in LAYOUTS if other != now])
    finish(place, run, [*LAYOUTS[now], *extra])
    apart = difference(never, run)
    left = [path.name for path in (run / sharded.FOLDER).iterdir() if not sharded.is_name(path.name)]
    moved = any(f"({layout})" not in each for each in kills) or now != layout
    good = not left and (apart["weights"] <= NEAR if moved else not any(apart.values()))
    if good:
        shutil.rmtree(run)
    return {"run": number, "layout": layout, "kills": kills, "end": now, **apart, "left": left, "good": good}


def writes(place: Path, layout: str) -> list[Fault]:
    """The disk is full from each write of a short run on; ranks between the first and the last do as the last does."""
    counting = fresh(place / "counting")
    running = finish(place, counting, [*LAYOUTS[layout], *SHORT])
    found = []
    for number in (0, RANKS - 1):
        grows = [point for point in running.points(number) if point.startswith(("write", "mkdir"))]
        found += [Fault(number, at, FULL) for at in range(len(grows))]
    return found


def full_run(place: Path, layout: str, fault: Fault) -> dict[str, Any]:
    """A run that meets a full disk, then has space again. A row of the report."""
    never, _ = undisturbed(place, layout, SHORT)
    run = fresh(place / f"full-{fault.rank}-{fault.at}")
    settings = [*LAYOUTS[layout], *SHORT, f"checkpoint.background={str(bool(fault.at % 2)).lower()}"]
    running = Run(place, run, settings, fault)
    statuses, where, said = running.end(), running.killed_at(), running.ours()
    finish(place, run, settings)
    apart = difference(never, run)
    good = where is None or (all(statuses) and len(said) == 1)
    good = good and not any(apart.values())
    if good:
        shutil.rmtree(run)
    row = {"full": f"rank {fault.rank}", "where": where, "said": said[:1], "layout": layout, **apart}
    return row | {"good": good}


def report(rows: list[dict[str, Any]], wanted: int, seed: int) -> str:
    """docs/soak.md."""
    killed = sorted((row for row in rows if "run" in row), key=lambda row: row["run"])
    full = [row for row in rows if "full" in row]
    kills, bad = [each for row in killed for each in row["kills"]], [row for row in rows if not row["good"]]
    inside = sum("of a write" in each for each in kills)
    here = [row for row in killed if row["weights"] == row["rest"] == row["loss"] == 0]
    apart = max((row["weights"] for row in killed), default=0.0)
    lines = [
        "# Soak",
        "",
        f"`make soak` (`python tests/soak/soak.py --kills {wanted} --seed {seed}`; torch {torch.__version__}):",
        f"{len(kills)} kills of runs of {RANKS} processes in {len(killed)} runs, {inside} of them in the middle of a",
        f"write; and a full disk from each of {len(full)} writes on. **{len(bad)} of {len(rows)} ended otherwise than",
        f"a run that met no fault.** {len(here)} runs ended the same to the bit, losses and moments too; weights of",
        f"the {len(killed) - len(here)} that went on in another layout ended within {apart:.1e} of it (these with",
        f"`{MOVING[0]}`: with Adam's usual 1e-8 two undisturbed runs of different layouts end up to 2.4e-5 apart).",
        "",
        *([] if len(kills) >= wanted and full else [f"**Not done yet:** {len(kills)} of {wanted} kills.", ""]),
        "## Kills",
        "",
        "| run | layout | killed | ended in | weights apart | loss apart | good |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in killed:
        told = "; ".join(row["kills"]) or "-"
        good = "yes" if row["good"] else f"**NO** {row['left']}"
        end = f"{row['end']} | {row['weights']:.1e} | {row['loss']:.1e} | {good}"
        lines.append(f"| {row['run'] + 1} | {row['layout']} | {told} | {end} |")
    lines += [
        "",
        "## A full disk",
        "",
        "| at, in " + (full[0]["layout"] if full else "") + " | said | good |",
        "|---|---|---|",
    ]
    for row in full:
        said = row["said"][0].split("shear-tron train: ")[-1][:120] if row["said"] else "(it ended before)"
        said = said.replace(row.get("place", "\0"), "")
        lines.append(f"| {row['full']}: {row['where']} | {said} | {'yes' if row['good'] else '**NO**'} |")
    return "\n".join(lines) + "\n"


def jobs(place: Path, rows: list[dict[str, Any]], kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """The rows that are still to be made."""
    done = sum(len(row.get("kills", ())) for row in rows)
    made = {row["run"] for row in rows if "run" in row}
    while done < kills:
        number = next(number for number in itertools.count() if number not in made)
        row = killed_run(place, number, kills - done, seed)
        made.add(number)
        done += len(row["kills"])
        yield row
    layout = "pp2 x tp2"
    for fault in writes(place, layout)[sum("full" in row for row in rows) :]:
        yield full_run(place, layout, fault)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slice", type=int, default=10**9, help="rows to make now")
    parser.add_argument("--place", type=Path, default=ROOT / "build" / "soak", help="where it works, and goes on")
    parser.add_argument("--report", type=Path, default=None)
    arguments = parser.parse_args()
    place = arguments.place.resolve()
    if not (place / "world" / "prune.yaml").exists():
        (place / "world").mkdir(parents=True)
        make_world(place / "world")
    file = place / f"rows-{arguments.seed}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for _, row in zip(range(arguments.slice), jobs(place, rows, arguments.kills, arguments.seed), strict=False):
        rows.append(row)
        with open(file, "a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    if arguments.report:
        arguments.report.write_text(report(rows, arguments.kills, arguments.seed))
    sys.exit(any(not row["good"] for row in rows))


if __name__ == "__main__":
    CONTEXT.set_forkserver_preload(PRELOADED)
    main()
