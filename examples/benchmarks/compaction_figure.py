"""Draws docs/compaction.png from the rows of pruning_step.csv and schedule.csv beside this script."""

import csv
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shear_tron.pruning.gates import LIMIT, hard_concrete

HERE = Path(__file__).parent
LEVELS, KINDS = ("open", "halfway", "closed"), ("dense", "masked", "compact")


def rows(name: str) -> list[dict[str, Any]]:
    with (HERE / name).open() as file:
        return list(csv.DictReader(file))


def measured() -> list[dict[str, Any]]:
    """The newest commit's rows of pruning_step.csv: medians of its runs."""
    found = rows("pruning_step.csv")
    found = [row for row in found if row["commit"] == found[-1]["commit"]]
    places = {(level, kind): [row for row in found if (row["gates"], row["step"]) == (level, kind)]
              for level in LEVELS for kind in KINDS}  # fmt: skip
    seconds = {place: median(float(row["seconds"]) for row in runs) for place, runs in places.items()}
    return [runs[0] | {"speed_to_dense": seconds[place[0], "dense"] / seconds[place],
                       "flops_to_dense": median(float(row["flops_to_dense"]) for row in runs)}
            for place, runs in places.items()]  # fmt: skip


def gate(axis: Axes) -> None:
    """Why it is exact: sample and slope of gates over the noise that draws them."""
    noise = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    for logit, name in ((-LIMIT, "closed unit"), (0.0, "undecided"), (LIMIT, "open unit")):
        axis.plot(noise, hard_concrete(torch.full_like(noise, logit), noise), label=name)
    axis.axhspan(-0.03, 0.005, color="grey", alpha=0.4)
    axis.set(title="a sampled gate: at 0 its slope is 0", xlabel="noise", ylabel="gate")
    axis.legend(fontsize="small")


def speed(axis: Axes) -> None:
    found = measured()
    for place, kind in enumerate(KINDS):
        speeds = [float(row["speed_to_dense"]) for level in LEVELS for row in found
                  if (row["gates"], row["step"]) == (level, kind)]  # fmt: skip
        bars = axis.bar(np.arange(len(LEVELS)) + (place - 1) * 0.27, speeds, 0.25, label=kind)
        axis.bar_label(bars, fmt="%.2f", fontsize="small")
    axis.set_xticks(range(len(LEVELS)), LEVELS)
    axis.set(title=f"speed, dense = 1 ({found[0]['device']})", xlabel="gates")
    axis.legend(fontsize="small")


def schedule(axis: Axes) -> None:
    found = [row for row in rows("schedule.csv") if row["balance"] == "1"]
    steps, shares = ([float(row[key]) for row in found] for key in ("step", "flops_to_dense"))
    # time for operations: straight lines between the three gate settings that were timed
    timed = [row for row in measured() if row["step"] == "compact"]
    known = sorted((float(row["flops_to_dense"]), 1 / float(row["speed_to_dense"])) for row in timed)
    seconds = np.interp(shares, *zip(*known, strict=True))
    axis.plot(steps, shares, label=f"operations at 7B, mean {np.mean(shares):.2f}")
    axis.plot(steps, seconds, label=f"time by the middle panel, mean {np.mean(seconds):.2f}")
    axis.set(title="the paper's 3,200 steps, dense = 1", xlabel="step of pruning", ylim=(0, 1.15))
    axis.legend(fontsize="small")
    for row in measured():
        print(f"{row['gates']:8} {row['step']:8} {row['speed_to_dense']:.2f} x dense")
    print(
        f"schedule: operations {np.mean(shares):.3f}, time {np.mean(seconds):.3f}: {1 / np.mean(seconds):.2f} x dense"
    )


if __name__ == "__main__":
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axis, draw in zip(figure.subplots(1, 3), (gate, speed, schedule), strict=True):
        draw(axis)
    figure.savefig(HERE.parents[1] / "docs" / "compaction.png", dpi=110)
