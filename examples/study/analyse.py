"""From a study's results to what may be said: python examples/study/analyse.py OUT [--arm ARM]

Writes OUT/study.csv (a line per run), OUT/tables.md (both tables, and how far selections agree) and OUT/study.png (loss
over operations, a line per arm). Differences to the reference arm are taken window by window and seed by seed; their
standard error is that of a bootstrap over both. A win is a difference beyond two of them with one sign in every seed.
With --arm it only prints how that arm stands next to every other.
"""

import argparse
import csv
import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

Values = dict[str, Any]
DRAWS = 2000


def mean_of_domains(losses: dict[str, list[float]]) -> float:
    return float(np.mean([np.mean(each) for each in losses.values()]))


def paired(arm: list[Values], reference: list[Values], seed: int = 0) -> tuple[float, float, list[float]]:
    """(difference, its standard error, difference by seed), nats per token; of the seeds that both have."""
    others = {each["seed"]: each for each in reference}
    gaps: list[dict[str, npt.NDArray[np.float64]]] = [
        {name: np.array(each["losses"][name]) - np.array(others[each["seed"]]["losses"][name])
         for name in each["losses"]}
        for each in arm if each["seed"] in others
    ]  # fmt: skip
    by_seed = [float(np.mean([gap.mean() for gap in gaps_of.values()])) for gaps_of in gaps]
    random, drawn = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        of_draw = []
        for place in random.integers(len(gaps), size=len(gaps)):
            domains = gaps[place].values()
            of_draw.append(np.mean([gap[random.integers(len(gap), size=len(gap))].mean() for gap in domains]))
        drawn.append(np.mean(of_draw))
    return float(np.mean(by_seed)), float(np.std(drawn)), by_seed


def verdict(difference: float, error: float, by_seed: list[float]) -> str:
    if abs(difference) > 2 * error and len({gap > 0 for gap in by_seed}) == 1:
        return "better" if difference < 0 else "worse"
    return "level"


def agreement(one: Values, other: Values, sizes: Values) -> dict[str, tuple[float, float]]:
    """By kind: the share of kept units that two runs have in common, and what chance would give."""
    found = {}
    for kind in sorted(one["kept"].keys() & other["kept"].keys()):
        pairs = list(zip(one["kept"][kind], other["kept"][kind], strict=False))
        shared = [len(set(a) & set(b)) / max(1, len(a)) for a, b in pairs]
        found[kind] = (float(np.mean(shared)), len(one["kept"][kind][0]) / sizes[kind])
    return found


def table(name: str, results: list[Values], reference: str, source: Values) -> list[str]:
    """One table of docs/study.md: at equal tokens or at equal operations."""
    arms: dict[str, list[Values]] = defaultdict(list)
    for each in results:
        if each["table"] == name or (each["arm"] == reference and each["table"] == "tokens"):
            arms[each["arm"]].append(each)
    rows = []
    for arm, runs in arms.items():
        losses = [mean_of_domains(each["losses"]) for each in runs]
        worst = np.mean([max(np.mean(each["losses"][domain]) - np.mean(source["losses"][domain])
                             for domain in source["losses"]) for each in runs])  # fmt: skip
        choice = np.mean([np.mean(list(each["choice"].values())) for each in runs])
        gap, error, by_seed = paired(runs, arms[reference])
        said = "reference" if arm == reference else verdict(gap, error, by_seed)
        gaps = "-" if arm == reference else f"{gap:+.4f} ± {error:.4f}"
        tokens, spent = np.mean([r["tokens"] for r in runs]) / 1e6, np.mean([r["operations"] for r in runs]) / 1e12
        cells = [arm, len(runs), f"{tokens:.2f}", f"{spent:.1f}", f"{np.mean(losses):.4f}", gaps, said]
        row = " | ".join(map(str, [*cells, f"{worst:.3f}", f"{choice:.3f}"]))
        rows.append((float(np.mean(losses)), f"| {row} |"))
    gap_of = f"minus {reference} ± s.e."
    head = ["arm", "seeds", "million tokens", "TFLOP", "loss", gap_of, "", "worst domain", "choice"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *(row for _, row in sorted(rows))]


def predicted(results: list[Values], said: Values) -> list[str]:
    """What was predicted, and what came."""
    lines = ["| arm | predicted | found |", "|---|---|---|"]
    of = {arm: [r for r in results if r["arm"] == arm and r["table"] == "tokens"] for arm in said["arms"]}
    for arm, (low, high) in said["predictions"].items():
        if of.get(arm) and of[said["reference"]]:
            gap, error, _ = paired(of[arm], of[said["reference"]])
            hit = "as predicted" if low <= gap <= high else "not as predicted"
            lines.append(f"| {arm} | {low:+.2f} to {high:+.2f} | {gap:+.4f} ± {error:.4f}, {hit} |")
    return lines


def next_to_others(claim: str, results: list[Values], said: Values) -> list[str]:
    """The arm ``claim`` next to every other, at equal tokens."""
    of = {arm: [r for r in results if r["arm"] == arm and r["table"] == "tokens"] for arm in said["arms"]}
    lines = [f"| {claim} minus | difference ± s.e. | by seed | |", "|---|---|---|---|"]
    for arm, runs in of.items():
        if arm != claim and runs and of[claim]:
            gap, error, by_seed = paired(of[claim], runs)
            seeds = ", ".join(f"{each:+.3f}" for each in by_seed)
            lines.append(f"| {arm} | {gap:+.4f} ± {error:.4f} | {seeds} | {verdict(gap, error, by_seed)} |")
    return lines


def selections(results: list[Values], said: Values) -> list[str]:
    """How far selections agree: between an arm's seeds, and with the reference's."""
    sizes = said["subject"]["source"] | {"heads_per_group": 1}
    of: dict[str, list[Values]] = defaultdict(list)
    for each in results:
        if each["table"] == "tokens" and each["kept"]:
            of[each["arm"]].append(each)
    lines = ["| arm | kind | between seeds | with the reference | chance |", "|---|---|---|---|---|"]
    for arm, runs in of.items():
        own = [agreement(a, b, sizes) for a, b in combinations(runs, 2)]
        others = [agreement(a, b, sizes) for a, b in zip(runs, of[said["reference"]], strict=False)]
        kinds = [kind for kind in others[0] if arm != "depth"] if others else []
        if said["arms"][arm]["prune"].get("rotate"):
            kinds.remove("hidden")  # its dimensions are other ones
        for kind in kinds:
            between = f"{np.mean([each[kind][0] for each in own]):.2f}" if own else "-"
            lines.append(f"| {arm} | {kind} | {between} | {np.mean([each[kind][0] for each in others]):.2f} "
                         f"| {others[0][kind][1]:.2f} |")  # fmt: skip
    return lines


def draw(results: list[Values], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    arms: dict[str, list[Values]] = defaultdict(list)
    for each in results:
        if each["table"] == "tokens":
            arms[each["arm"]].append(each)
    for number, (arm, runs) in enumerate(arms.items()):
        curves = np.array([each["curve"] for each in runs])  # [seeds, evaluations, (operations, loss)]
        style = ("-", "--", ":")[number // 10 % 3]
        axis.plot(curves[..., 0].mean(0) / 1e12, curves[..., 1].mean(0), style, label=arm, linewidth=1.3)
    axis.set(xlabel="TFLOP", ylabel="held-out loss, nats per token", title="mean over domains and seeds")
    axis.legend(fontsize="small", frameon=False)
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arm")
    arguments = parser.parse_args()
    out = arguments.out
    said = yaml.safe_load((out / "study.yaml").read_text())
    source = json.loads((out / "results" / "source.json").read_text())
    files = sorted(file for file in (out / "results").glob("*.json") if file.name != "source.json")
    results = [json.loads(file.read_text()) for file in files]
    if arguments.arm is not None:
        if arguments.arm not in said["arms"]:
            parser.error(f"--arm {arguments.arm}: no arm of {out / 'study.yaml'}, which has {', '.join(said['arms'])}")
        print("\n".join(next_to_others(arguments.arm, results, said)))
        return
    with (out / "study.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "arm", "seed", "rate", "tokens", "operations", "loss", "choice", *source["losses"]])
        for r in results:
            row = [round(float(np.mean(each)), 5) for each in r["losses"].values()]
            choice = round(float(np.mean(list(r["choice"].values()))), 4)
            head = [r["table"], r["arm"], r["seed"], r["rate"], r["tokens"], f"{r['operations']:.4g}"]
            writer.writerow([*head, round(mean_of_domains(r["losses"]), 5), choice, *row])
    reference = said["reference"]
    spent = f"{source['operations'] / 1e12:.1f} TFLOP went into it before"
    text = [f"The source: {mean_of_domains(source['losses']):.4f} nats per token; {spent}, counted in no arm.", ""]
    for name in ("tokens", "operations"):
        if any(each["table"] == name for each in results):
            text += [f"Equal {name}", "", *table(name, results, reference, source), ""]
    text += ["The claim", "", *next_to_others(said["claim"], results, said), ""]
    text += ["Predictions", "", *predicted(results, said), "", "Selections", "", *selections(results, said)]
    (out / "tables.md").write_text("\n".join(text) + "\n")
    draw(results, out / "study.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
