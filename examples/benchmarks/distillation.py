"""What learning from a teacher costs a training step, in time and in memory.

    python examples/benchmarks/distillation.py [--rounds 5]

The student has the shape that `examples/smollm2` shears SmolLM2-135M to, the teacher SmolLM2-135M's own; weights are
random. A step is forward, backward, clipping and AdamW, of 4 x 128 tokens on the CPU (CUDA: 16 x 2,048, bfloat16).
Interleaved: a plain step, the teacher's forward with its loss, the step with the teacher, the step with 16 cached
samples a token. Wanted: the step with the teacher at most 5 % above the plain step and the teacher's forward, its peak
memory at most 10 % above the plain step's and the teacher's weights. A row is appended to distillation.csv beside this
script; about two minutes on two cores.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import shear_kernels
import torch
from pruning_step import Memory, Random
from rows import append
from shear_kernels import sample_teacher
from shear_kernels.sampling import WHOLE

from shear_tron.architecture import Architecture
from shear_tron.model.context import DENSE, Context, TeacherSamples, TeacherStates
from shear_tron.model.distill import Distill
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, start
from shear_tron.params import count
from shear_tron.shape import Shape
from shear_tron.train.teacher import Teacher

ROWS = Path(__file__).with_suffix(".csv")
TEACHER = Shape(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, tied=True)
STUDENT = replace(TEACHER, layers=24, ffn=1024)
PORTION = {"cpu": (4, 128), "cuda": (16, 2048)}  # sequences, tokens of each
SAMPLES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch, sequence = PORTION[device.type]
    topology, memory = start(Layout(), device), Memory(device)
    counts = 1, batch, sequence, compute
    stages = build_stages(Architecture(STUDENT, context=sequence), topology, "none", Distill(0.7))
    stages = [shard(stage, Random(STUDENT), topology, torch.float32, compute) for stage in stages]
    engine = Engine(stages, topology, *counts)
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.parameters()], lr=1e-6, fused=True)
    windows = torch.randint(TEACHER.vocab, (batch, sequence + 1), generator=torch.Generator().manual_seed(2)).to(device)
    tokens, labels = windows[:, :-1], windows[:, 1:]

    def step(contexts: Iterable[Context]) -> None:
        engine.train(tokens, labels, contexts)
        sync.clip(stages, 1.0, topology)
        optimizer.step()
        optimizer.zero_grad()

    def measured(work: Callable[[], object]) -> tuple[float, float]:
        """(seconds, peak bytes)"""
        memory.reset()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, memory.peak() * 2**30

    for _ in range(2):  # warms up, and makes the optimizer's state
        step([DENSE])
    plain = max(measured(lambda: step([DENSE]))[1] for _ in range(2))  # before a teacher is there

    teacher = Teacher(Architecture(TEACHER, context=sequence), Random(TEACHER), topology, *counts)
    (context,) = teacher.teach(tokens, None)
    assert isinstance(context.teacher, TeacherStates)
    states, head = context.teacher.states, context.teacher.head
    points = torch.rand(2, batch * sequence, device=device)
    ids, parts, information = sample_teacher(states, head, SAMPLES, points)
    cached = replace(DENSE, teacher=TeacherSamples(ids, parts.float() / WHOLE, information))

    @torch.no_grad()
    def forward() -> None:
        for each in teacher.teach(tokens, None):
            assert isinstance(each.teacher, TeacherStates)
            shear_kernels.vocab_cross_entropy(each.teacher.states, each.teacher.head, labels.flatten())

    kinds: dict[str, Callable[[], object]] = {
        "plain": lambda: step([DENSE]),
        "forward": forward,
        "taught": lambda: step(teacher.teach(tokens, [DENSE])),
        "cached": lambda: step([cached]),
    }
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for number in range(-1, rounds):  # the first warms up
        names = list(kinds)
        for kind in names[number % 4 :] + names[: number % 4]:
            result = measured(kinds[kind])
            if number >= 0:
                found[kind].append(result)
    seconds = {kind: statistics.median(second for second, _ in each) for kind, each in found.items()}
    taught, weights = max(peak for _, peak in found["taught"]), count(Architecture(TEACHER)) * compute.itemsize
    row = {"tokens": batch * sequence, **{f"{kind}_seconds": round(each, 4) for kind, each in seconds.items()}}
    row |= {
        "time_ratio": round(seconds["taught"] / (seconds["plain"] + seconds["forward"]), 4),  # wanted: 1.05 at most
        "cached_ratio": round(seconds["cached"] / seconds["plain"], 4),
        "plain_gib": round(plain / 2**30, 3),
        "taught_gib": round(taught / 2**30, 3),
        "teacher_gib": round(weights / 2**30, 3),
        "memory_ratio": round(taught / (plain + weights), 4),  # wanted: 1.10 at most
        "rounds": rounds,
    }
    append(ROWS, row)


if __name__ == "__main__":
    main()
