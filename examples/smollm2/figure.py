"""A picture of a pruning run and the training after it: python examples/smollm2/figure.py [RUNS]"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from shear_tron.train import metrics

KINDS = {
    "hidden": "hidden",
    "layers": "layers",
    "kv_heads": "key-value heads",
    "heads_per_group": "query heads per group",
    "ffn": "ffn",
}


def draw(runs: Path) -> Path:
    """Write ``runs/shearing.png``: sparsity, loss, and the mixture of domains, step by step."""
    pruning, continuing = metrics.read(runs / "prune"), metrics.read(runs / "continue")
    figure, (sparsity, loss, mixture) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")

    steps = [line["step"] for line in pruning]
    for kind, label in KINDS.items():
        if f"expected_{kind}_sparsity" in pruning[0]:
            (drawn,) = sparsity.plot(steps, [line[f"expected_{kind}_sparsity"] for line in pruning], label=label)
            wanted = [line[f"target_{kind}_sparsity"] for line in pruning]
            sparsity.plot(steps, wanted, color=drawn.get_color(), linestyle=":", linewidth=1)
    sparsity.set(title="share pruned (dotted: wanted)", xlabel="pruning step", ylim=(-0.02, None))
    sparsity.legend(frameon=False)

    both = pruning + [{**line, "step": line["step"] + steps[-1]} for line in continuing]
    loss.plot([line["step"] for line in both], [line["loss"] for line in both], color="0.75", label="training batch")
    evaluated = [line for line in both if "held_out" in line]
    means = [sum(line["held_out"].values()) / len(line["held_out"]) for line in evaluated]
    loss.plot([line["step"] for line in evaluated], means, marker="o", label="held out, mean of domains")
    loss.axvline(steps[-1], color="black", linewidth=0.8)
    loss.annotate(" extracted", (steps[-1], 1), xycoords=("data", "axes fraction"), va="top")
    loss.set(title="loss, nats a token", xlabel="step")
    loss.legend(frameon=False)

    names = list(both[0]["weights"])
    series = [[line["weights"][name] for line in both] for name in names]
    mixture.stackplot([line["step"] for line in both], series, labels=names, alpha=0.85)
    mixture.axvline(steps[-1], color="black", linewidth=0.8)
    mixture.set(title="mixture of domains", xlabel="step", ylim=(0, 1))
    mixture.margins(x=0)
    mixture.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)

    target = runs / "shearing.png"
    figure.savefig(target, dpi=110)
    return target


if __name__ == "__main__":
    print(draw(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2")))
