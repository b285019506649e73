"""One PNG per op from results.csv: the rivals' time over the share of closed units, forward and backward."""

import csv
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw the newest rows of every op in ``results`` to ``folder``/OP.png; nothing without rows or matplotlib."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    for op in sorted({row["op"] for row in rows}):
        mine = [row for row in rows if row["op"] == op]
        models = sorted({(row["model"], int(row["sequence"])) for row in mine})
        figure, axes = plt.subplots(2, len(models), figsize=(4.2 * len(models), 7), squeeze=False, sharex=True)
        for column, (model, sequence) in enumerate(models):
            for line, direction in enumerate(("forward", "backward")):
                curves: dict[str, dict[float, float]] = defaultdict(dict)
                for row in mine:
                    if (row["model"], int(row["sequence"]), row["direction"]) == (model, sequence, direction):
                        curves[row["rival"]][float(row["closed"])] = float(row["median_ms"])  # later rows win
                for rival, points in curves.items():
                    x = sorted(points)
                    axes[line][column].plot([100 * v for v in x], [points[v] for v in x], marker="o", label=rival)
                axes[line][column].set_title(f"{model}, {sequence} tokens, {direction}", fontsize=9)
                axes[line][column].set_ylim(bottom=0)
        for axis in axes[1]:
            axis.set_xlabel("closed, %")
        for axis in axes[:, 0]:
            axis.set_ylabel("ms")
        axes[0][0].legend(fontsize=7)
        figure.suptitle(f"{op} on {mine[-1]['gpu']}")
        figure.tight_layout()
        target = folder / f"{op}.png"
        figure.savefig(target, dpi=120)
        plt.close(figure)
        drawn.append(target)
    return drawn
