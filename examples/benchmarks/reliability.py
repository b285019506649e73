"""What reliability costs: a step with everything on next to one with nothing, the stall of a save, a resume.

    make demo                                           # once: its model and data
    python examples/benchmarks/reliability.py [--steps 24] [--every 8] [--rounds 2] [CONFIG] [section.key=value ...]

Runs of the demo's continued training (or of CONFIG), one process, in turns. *Nothing*: no vote of the ranks, no look at
losses and gradients, no save. *Everything*: those, a checkpoint every 8 steps in the background and its copy by fsspec,
shards verified, going back armed. The stall is the time that training waits in a save; the seconds of a step are those
between two lines of the log. A resume is from the end of imports to the first step, in a process of its own. About six
minutes on two cores, which nothing else may use. A row is appended to reliability.jsonl beside this script.

A save costs the same however rare it is: the seconds that all steps between lines of the log took longer than with
nothing, by the saves among them. From that follow the speed at any interval, and the shortest interval at which 0.98
of the speed is kept. `--steps 121 --every 60 --rounds 1` measures at an interval of minutes instead.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from shear_tron import cli
from shear_tron.checkpoint.checkpointer import Checkpointer
from shear_tron.train import loop, metrics
from shear_tron.train.health import Health
from shear_tron.train.loop import Trainer

ROWS = Path(__file__).with_suffix(".jsonl")
CONFIG = "examples/smollm2/continue.yaml"
SAME = ["data.update_every=0", "checkpoint.minutes=0"]  # no evaluation between steps


@contextmanager
def nothing() -> Iterator[None]:
    """Training that looks at nothing and saves nothing."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "highest", lambda *votes: [0 for _ in votes]))
        stack.enter_context(patch.object(Health, "problem", lambda *_: None))
        stack.enter_context(patch.object(Checkpointer, "save", lambda *_: None))
        yield


@dataclass
class Saves:
    """Of each save: seconds that training waits in it, and CPU-seconds of the wait (a save before it that is not done
    yet included) and of the thread that writes; and from when to when either was at work."""

    busy: list[tuple[float, float]] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    cpu_waited: list[float] = field(default_factory=list)
    cpu_written: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        save, write = Checkpointer.save, Checkpointer._write

        def timed_save(checkpointer: Checkpointer, *arguments: Any) -> None:
            began, cpu_began = time.time(), time.process_time()
            save(checkpointer, *arguments)
            self.busy.append((began, time.time()))
            self.waited.append(time.time() - began)
            self.cpu_waited.append(time.process_time() - cpu_began)

        def timed_write(checkpointer: Checkpointer, *arguments: Any) -> None:
            began, cpu_began = time.time(), time.thread_time()
            write(checkpointer, *arguments)
            self.busy.append((began, time.time()))
            self.cpu_written.append(time.thread_time() - cpu_began)

        with patch.object(Checkpointer, "save", timed_save), patch.object(Checkpointer, "_write", timed_write):
            yield


Step = tuple[float, float]  # when the line before its own in the log was written, and its own; seconds since 1970


def steps_of(run: Path) -> list[Step]:
    """All but the first."""
    return list(pairwise(line["time"] for line in metrics.read(run)))[1:]


def seconds(steps: list[Step]) -> list[float]:
    return [end - start for start, end in steps]


def train(arguments: list[str]) -> None:
    if cli.main(["train", *arguments]):
        sys.exit("the run failed")


def resume(arguments: list[str]) -> None:
    """In a process of its own: print the seconds from here to the first step."""
    began = time.perf_counter()

    def first(*_: Any) -> None:
        print(f"seconds {time.perf_counter() - began}", flush=True)
        sys.exit(0)

    with patch.object(Trainer, "_update", first):
        train(arguments)


def measure(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    every = [f"checkpoint.every={given.every}", "checkpoint.background=true", "checkpoint.keep=1"]
    every += [f"checkpoint.upload=file://{place}/copy", "data.verify=true", "train.rewind_above=9"]
    common = [given.config, *given.overrides, *SAME, f"train.steps={given.steps}"]
    steps: dict[str, list[Step]] = {"nothing": [], "everything": []}
    saves = Saves()
    for number in range(given.rounds):
        bare, run = place / f"bare-{number}", place / f"run-{number}"
        with nothing():
            train([*common, f"run={bare}"])
        steps["nothing"] += steps_of(bare)
        with saves.timed():
            train([*common, *every, f"run={run}"])
        steps["everything"] += steps_of(run)
    again = [*common, "train.rewind_above=9", f"train.steps={given.steps + 1}", f"run={run}"]
    child = subprocess.run([sys.executable, __file__, "--resume", *again], capture_output=True, text=True, check=True)
    told = next(line for line in child.stdout.splitlines() if line.startswith("seconds "))
    least, most = (statistics.mean(seconds(each)) for each in steps.values())
    free = [step for step in steps["everything"] if not any(a < step[1] and step[0] < b for a, b in saves.busy)]
    usual, usual_free = (statistics.median(seconds(each) or [0]) for each in (steps["nothing"], free))
    among = given.rounds * ((given.steps - 1) // given.every)  # saves between lines of the log: all but the last one's
    lost = max(0.0, (most - least) * len(steps["everything"]) / among)
    between = given.every * least
    return {
        "config": given.config,
        "steps": given.steps * given.rounds,
        "every": given.every,
        "step_nothing": round(least, 4),  # seconds, mean
        "step_everything": round(most, 4),  # with the saves among them
        "speed_without_saves": round(usual / usual_free, 4) if free else None,  # medians: of the votes and looks
        "stall": round(statistics.mean(saves.waited), 4),  # seconds of a save that training waits
        "stall_share": round(statistics.mean(saves.waited) / between, 4),  # of a step, averaged
        "stall_again": round(statistics.median(saves.waited), 4),  # the first of a run makes the room for copies too
        "save_cpu": round(statistics.mean(saves.cpu_waited) + statistics.mean(saves.cpu_written), 2),  # CPU-seconds
        "save_lost": round(lost, 2),  # seconds of training that a save costs, its stall included
        "speed": round(between / (between + lost), 4),  # next to nothing, with a save every so many steps
        "speed_half_hour": round(1800 / (1800 + lost), 4),  # at the default interval
        "seconds_between_for_0.98": round(lost * 0.98 / 0.02, 1),  # saves further apart keep 0.98 of the speed
        "resume": round(float(told.split()[1]), 2),  # seconds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=CONFIG)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    if given.steps <= given.every:
        parser.error(f"--steps {given.steps} has no save among them; give more than --every {given.every}")
    with tempfile.TemporaryDirectory() as place:
        row = measure(given, Path(place))
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"commit": commit, "date": str(datetime.date.today()), "cpu": platform.processor() or platform.machine()}
    row |= machine | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(row, indent=1))
    print(
        f"Training waits {row['stall']} s in a save, {row['stall_share']:.1%} of the {given.every} steps between saves "
        f"here. A save takes {row['save_cpu']} CPU-seconds and costs {row['save_lost']} s of training: {row['speed']} "
        f"of the speed at this interval, {row['speed_half_hour']} at half an hour, and 0.98 where saves are at least "
        f"{row['seconds_between_for_0.98']} s apart."
    )
    with open(ROWS, "a") as rows:
        rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--resume"]:
        resume(sys.argv[2:])
    else:
        main()
