"""What a whole pruning run costs, and how evenly its gates close over tensor-parallel ranks.

    python examples/benchmarks/schedule.py OUT

Trains a small MHA model on six domains of real text, then prunes it over the paper's 3,200 steps (640 of warm-up, mask
rate 1.0) in the ratios of 7B -> 1.3B, once freely and once with ``prune.balance: 8``. The logits of every 20th step are
then played back at the sizes of LLaMA-2-7B: each kind's chance to be open, layer by layer and block by block, gives the
operations of a step next to a dense one, and those of the slowest tensor-parallel rank next to the mean.
Writes schedule.csv beside this script. About half an hour on two cores.
"""

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

import torch
from small import trained_source, training, write
from torch import Tensor

from shear_tron.config import load
from shear_tron.parallel import topology
from shear_tron.pruning.config import TargetConfig
from shear_tron.pruning.gates import Gates
from shear_tron.shape import Shape
from shear_tron.train import metrics
from shear_tron.train.claim import claim_run_folder
from shear_tron.train.config import RunConfig
from shear_tron.train.loop import Trainer
from shear_tron.train.plan import inputs, plan, precision

SOURCE = Shape(hidden=256, layers=8, heads=16, kv_heads=16, head_dim=16, ffn=704, vocab=2048)
TARGET = {"hidden": 128, "layers": 6, "heads": 8, "kv_heads": 8, "ffn": 352}
STEPS, WARMUP, EVERY, BATCH = 3200, 640, 20, 2
RANKS = (2, 4, 8)
RELOAD = 800  # a step at which units could be dealt to tensor-parallel ranks anew, by their logits

# Multiply-adds of a token in LLaMA-2-7B at 4,096 tokens per sequence: a layer's projections, its gated MLP, its causal
# attention scores and sums, and the output head.
LAYERS, ATTENTION, FFN, SCORES, HEAD = 32, 4 * 4096**2, 3 * 4096 * 11008, 4096 * 4096, 4096 * 32000


def prune(out: Path, source: Path, balance: int) -> None:
    """A pruning run, its recorded logits in ``balance<N>.pt``: by kind, [records, units]."""
    file = out / f"balance{balance}.pt"
    if file.exists():
        return
    values = training(out, f"prune{balance}", source, STEPS, BATCH, 1e-4)
    values["prune"] = {"target": TARGET, "warmup_steps": WARMUP, "learning_rate": 1.0, "balance": balance}
    config = load(RunConfig, write(out / f"prune{balance}.yaml", values))
    planned = plan(config, 1)
    claim_run_folder(config)
    device, compute = precision(config)
    trainer = Trainer(planned, inputs(planned), topology.start(planned.layout, device), compute)
    assert trainer.pruner is not None
    gates, step, records = trainer.pruner.method.gates, trainer.pruner.step, []

    def recorded(rate_factor: float) -> None:
        if trainer.step % EVERY == 0:
            records.append({kind: logits.clone() for kind, logits in gates.state_dict().items()})
        step(rate_factor)

    trainer.pruner.step = recorded  # type: ignore[method-assign]
    trainer.fit()
    torch.save({kind: torch.stack([record[kind] for record in records]) for kind in records[0]}, file)


def cost(chances: dict[str, Tensor]) -> float:
    """Operations of a mean step over a dense step's, at the sizes of 7B; gates are independent, so means multiply."""
    hidden, layers = chances["hidden"].mean(), chances["layers"]
    heads, ffn = chances["kv_heads"].mean(-1), chances["ffn"].mean(-1)
    whole = ATTENTION + FFN + SCORES
    layer = (layers * (hidden * (heads * ATTENTION + ffn * FFN) + heads * SCORES)).mean() * LAYERS
    return float((layer + hidden * HEAD) / (LAYERS * whole + HEAD))


def wait(chances: dict[str, Tensor], ranks: int, order: dict[str, Tensor] | None = None) -> float:
    """Layers' operations of the slowest of ``ranks`` over the mean of all: both halves of a layer end in a collective.

    Means over sampled masks; ``order`` permutes the units first.
    """
    slowest = mean = 0.0
    for kind, price in (("kv_heads", ATTENTION + SCORES), ("ffn", FFN)):
        units = chances[kind] if order is None else chances[kind].gather(-1, order[kind])
        draws = torch.rand(16, *units.shape, generator=torch.Generator().manual_seed(0)) < units
        shares = draws.unflatten(-1, (ranks, -1)).double().mean(-1)  # [draw, layer, rank]
        slowest += price * float((chances["layers"] * shares.amax(-1)).mean())
        mean += price * float((chances["layers"] * shares.mean(-1)).mean())
    return slowest / mean


def dealt(chances: dict[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """A permutation of each layer's units that deals them, likeliest open first, to and fro over ``ranks``."""
    found = {}
    for kind in ("kv_heads", "ffn"):
        ranking = chances[kind].argsort(-1, descending=True).unflatten(-1, (-1, ranks))  # [layer, round, rank]
        ranking[:, 1::2] = ranking[:, 1::2].flip(-1)
        found[kind] = ranking.transpose(-1, -2).flatten(-2)
    return found


def play_back(out: Path, balance: int) -> list[dict[str, Any]]:
    logits = torch.load(out / f"balance{balance}.pt", weights_only=True)
    gates = Gates(SOURCE, TargetConfig(**TARGET).shape(SOURCE))
    rows, order = [], {}
    for record in range(len(logits["hidden"])):
        gates.load_state_dict({kind: values[record] for kind, values in logits.items()})
        chances = {kind: chance.detach() for kind, chance in gates.expected().items()}
        step = record * EVERY
        if step == RELOAD:
            order = {ranks: dealt(chances, ranks) for ranks in RANKS}
        row: dict[str, Any] = {"balance": balance, "step": step, "flops_to_dense": round(cost(chances), 4)}
        row |= {f"tp{ranks}_slowest_to_mean": round(wait(chances, ranks), 3) for ranks in RANKS}
        for ranks in RANKS:
            row[f"tp{ranks}_dealt_anew"] = round(wait(chances, ranks, order[ranks]), 3) if order else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.absolute()
    source = trained_source(out, SOURCE, 500, 16)
    rows = []
    for balance in (1, 8):
        prune(out, source, balance)
        played = play_back(out, balance)
        rows += played
        mean = statistics.mean(row["flops_to_dense"] for row in played)
        last = metrics.read(out / f"prune{balance}")[-1]
        held_out = statistics.mean(last["held_out"].values())
        print(f"balance {balance}: held-out loss {held_out:.3f}, operations over the schedule {mean:.3f} of dense's")
        for ranks in RANKS:
            late = [row for row in played if row["step"] >= RELOAD]
            plain, anew = (
                statistics.mean(row[f"tp{ranks}_{name}"] for row in late) for name in ("slowest_to_mean", "dealt_anew")
            )
            print(f"  tp {ranks}: the slowest rank does {plain:.2f} x the mean, {anew:.2f} x dealt anew at {RELOAD}")
    with Path(__file__).with_suffix(".csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
