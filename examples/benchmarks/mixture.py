"""What dynamic batch loading does: one pruned model continued twice on the same number of tokens.

    python examples/benchmarks/mixture.py OUT [--steps 600]

Trains a small source model on six domains of real text, prunes it to about a quarter, and continues the pruned model
(a) with constant weights and (b) with the paper's Algorithm 1, the source's losses as references. Writes
OUT/mixture.jsonl, a line an evaluation (run, step, tokens, weights, excess loss by domain), and OUT/mixture.png.
Downloads 33 MB of text (examples/smollm2/fetch_text.py). Takes about fifteen minutes on two cores.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from small import SEQUENCE, run, trained_source, training, write

from shear_tron.shape import Shape
from shear_tron.train import metrics

SOURCE = Shape(hidden=128, layers=4, heads=4, kv_heads=4, head_dim=32, ffn=344, vocab=2048, tied=True)
BATCH = 16
RUNS = {"constant": 0, "algorithm1": 25}  # steps between updates of the weights; 0: never


def make(out: Path, steps: int) -> dict[str, float]:
    """Everything up to the two runs' logs. Returns the reference losses. What is made already is kept."""
    trained, pruned = trained_source(out, SOURCE, 2 * steps, BATCH), out / "pruned"
    if not pruned.exists():
        values = training(out, "prune", trained, steps // 2, BATCH, 3e-4)
        target = {"hidden": 80, "layers": 3, "heads": 2, "kv_heads": 2, "ffn": 176}
        values["prune"] = {"target": target, "warmup_steps": steps // 4, "learning_rate": 1.0}
        run("-m", "shear_tron", "train", write(out / "prune.yaml", values))
        run("-m", "shear_tron", "extract", out / "prune", pruned)
    references = held_out(out / "train")[-1]["held_out"]
    for name, every in RUNS.items():
        data = {"reference_losses": references, "update_every": every, "evaluate_every": 25}
        file = write(out / f"{name}.yaml", training(out, name, pruned, steps, BATCH, 1e-3, **data))
        run("-m", "shear_tron", "train", file)
    return dict(references)


def held_out(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics.read(folder) if "held_out" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    references = make(out, arguments.steps)
    lines = [
        {
            "run": name,
            "step": line["step"],
            "tokens": line["step"] * BATCH * SEQUENCE,
            "weights": {domain: round(weight, 5) for domain, weight in line["weights"].items()},
            "excess": {domain: round(loss - references[domain], 4) for domain, loss in line["held_out"].items()},
        }
        for name in RUNS
        for line in held_out(out / name)
    ]
    (out / "mixture.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(lines, out / "mixture.png")
    for name in RUNS:
        excess = [line for line in lines if line["run"] == name][-1]["excess"].values()
        mean = sum(excess) / len(excess)
        print(f"{name}: excess loss mean {mean:.3f}, from {min(excess):.3f} to {max(excess):.3f}")


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, name, key in zip(
        axes, ("algorithm1", "algorithm1", "constant"), ("weights", "excess", "excess"), strict=True
    ):
        chosen = [line for line in lines if line["run"] == name]
        for domain in chosen[0][key]:
            axis.plot([line["tokens"] / 1e6 for line in chosen], [line[key][domain] for line in chosen], label=domain)
        axis.set_title(f"{key if key == 'weights' else 'loss above reference'}, {name}")
        axis.set_xlabel("million tokens")
    axes[0].legend(fontsize="small")
    low, high = (edge(*(axis.get_ylim()[side] for axis in axes[1:])) for edge, side in ((min, 0), (max, 1)))
    for axis in axes[1:]:
        axis.set_ylim(low, high)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
