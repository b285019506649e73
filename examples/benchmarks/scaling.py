"""Scaling on paper: python examples/benchmarks/scaling.py [OUT]

Both stages of 7B -> 1.3B on 8 to 4,096 H100 by `shear-tron plan`'s arithmetic: the fastest layout that fits at each
size, its hours, and tokens/s per GPU as a share of the first size's. Writes OUT/scaling.csv and OUT/scaling.png
(default: docs). Nothing is measured.
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

from shear_tron.architecture import Architecture
from shear_tron.forecast.devices import device
from shear_tron.forecast.job import Job
from shear_tron.forecast.known import SHAPES
from shear_tron.forecast.layouts import ranked
from shear_tron.forecast.recipe import Stage, second_stage
from shear_tron.parallel.topology import Layout
from shear_tron.shape import Shape

TARGET = Shape(2048, 24, 16, 16, 128, 5504, 32000)
GPUS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def main(out: Path) -> None:
    h100 = device("h100")
    job = Job(Architecture(SHAPES["llama-2-7b"], context=4096), Layout(), 32, 1, 4096, pruning=True)
    first = Stage("stage 1", job, 3200, TARGET, 0.2)
    second = second_stage(first, 50e9)
    stages = [
        replace(first, title="stage 1, batch of 131 k tokens"),
        replace(first, title="stage 1, 1 M", job=replace(job, batch=256), steps=400),
        replace(second, title="stage 2, 1 M"),
        replace(second, title="stage 2, 4 M", job=replace(second.job, batch=1024), steps=second.steps // 4),
    ]
    rows = []
    for stage in stages:
        base = None
        for gpus in GPUS:
            fitting, _ = ranked(stage.job, gpus, h100, stage.target, stage.warm_up_share)
            if not fitting:
                continue
            best = fitting[0]
            rate = stage.job.batch * stage.job.time / best.seconds / gpus
            base = base or rate
            hours, gigabytes = best.seconds * stage.steps / 3600, best.peak.total / 1e9
            row = [stage.title, gpus, hours, rate / base, gigabytes, best.settings]
            print(*row)
            rows.append(row)
    with (out / "scaling.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["stage", "gpus", "hours", "efficiency", "gigabytes", "settings"])
        table.writerows([[stage, n, f"{h:.3g}", f"{e:.3f}", f"{m:.1f}", s] for stage, n, h, e, m, s in rows])
    draw(rows, out / "scaling.png")


def draw(rows: list[list], picture: Path) -> None:  # type: ignore[type-arg]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for title in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == title]
        left.plot([row[1] for row in mine], [row[2] for row in mine], marker="o", label=title)
        right.plot([row[1] for row in mine], [row[3] for row in mine], marker="o", label=title)
    left.set(xscale="log", yscale="log", xlabel="H100", ylabel="hours of the stage", title="on paper: time")
    right.set(xscale="log", ylim=(0, 1.2), xlabel="H100", title="on paper: tokens/s per GPU, first size = 1")
    for axes in (left, right):
        axes.set_xticks(GPUS, [str(n) for n in GPUS], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
