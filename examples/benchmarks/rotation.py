"""How long turning the residual stream of SmolLM2-135M to its principal axes takes, untied, as `prune.rotate` does it.

    python examples/benchmarks/rotation.py [MODEL]

MODEL: a Hugging Face folder, such as `examples/smollm2/fetch_model.py` writes; without one, random weights in
SmolLM2-135M's shape. Second moments over the default 16 batches of 4 x 128 tokens, as in `examples/smollm2`; axes;
all weights turned in float64, written and read back. Wanted: 120 s at most on two cores. The loss before and after is
there to see that the function stayed. A row is appended to rotation.csv beside this script.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from distillation import TEACHER
from pruning_step import Memory, Random
from rows import append
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import huggingface, sharded
from shear_tron.model.context import DENSE
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, start
from shear_tron.params import count, params
from shear_tron.pruning.rotate import Turned, principal_axes
from shear_tron.train.rotation import second_moments, write_turned

ROWS = Path(__file__).with_suffix(".csv")
BATCHES, BATCH, SEQUENCE = 16, 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    with tempfile.TemporaryDirectory() as room:
        measure(parser.parse_args().model, Path(room))


def measure(model: str | None, room: Path) -> None:
    if model is None:
        source = Architecture(TEACHER, context=SEQUENCE)
        random = Random(TEACHER)
        huggingface.write(room / "model", source, ((each.name, random.read(each.name)) for each in params(source)))
    folder = Path(model) if model else room / "model"
    source = huggingface.read_architecture(folder)
    topology, memory = start(Layout(), torch.device("cpu")), Memory(torch.device("cpu"))
    weights = Turned(huggingface.Weights.open(folder, source), source)
    stages = build_stages(weights.architecture, topology, "none")
    stages = [shard(stage, weights, topology, torch.float32, torch.float32) for stage in stages]
    engine = Engine(stages, topology, 1, BATCH, SEQUENCE, torch.float32)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(source.shape.vocab, (BATCHES, BATCH, SEQUENCE + 1), generator=generator)
    batches = [(each[:, :-1], each[:, 1:]) for each in windows]

    def loss() -> float:
        found = engine.evaluate(*batches[0], DENSE)
        assert isinstance(found, Tensor)
        return round(float(found.mean()), 6)

    before = loss()
    memory.reset()
    marks = [time.perf_counter()]
    moments = second_moments(engine, batches, topology)
    marks.append(time.perf_counter())
    _, axes = principal_axes(moments)
    marks.append(time.perf_counter())
    write_turned(Turned(weights.weights, source, axes), room / "turned")
    marks.append(time.perf_counter())
    sharded.read_into({name: p.detach() for stage in stages for name, p in stage.named_parameters()}, room / "turned")
    marks.append(time.perf_counter())
    peak = memory.peak()
    each = dict(zip(("moments", "axes", "turning", "reading"), (b - a for a, b in pairwise(marks)), strict=True))
    row = {"weights": "SmolLM2-135M" if model else "random", "parameters": count(weights.architecture)}
    row |= {"tokens": BATCHES * BATCH * SEQUENCE}
    row |= {f"{part}_seconds": round(second, 2) for part, second in each.items()}
    row |= {"seconds": round(marks[-1] - marks[0], 2)}  # wanted: 120 at most
    append(ROWS, row | {"peak_gib": round(peak, 3), "loss_before": before, "loss_after": loss()})


if __name__ == "__main__":
    main()
