"""Forecast memory against the measured peak of a training step: every allocation that torch's profiler sees."""

from dataclasses import replace

import pytest
import ranks
import torch
from torch.profiler import ProfilerActivity, profile

from shear_tron.architecture import Architecture
from shear_tron.forecast.job import Job
from shear_tron.forecast.memory import peak
from shear_tron.masks import Masks
from shear_tron.model.context import Context
from shear_tron.model.distill import Distill
from shear_tron.model.readout import NEXT_TOKEN
from shear_tron.parallel import sync, topology
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout
from shear_tron.params import params
from shear_tron.pruning.gates import Gates
from shear_tron.shape import Shape
from shear_tron.train.config import OptimizerConfig
from shear_tron.train.optimizer import adamw, start_moments
from shear_tron.train.teacher import Teacher

WIDE_VOCABULARY = Shape(hidden=256, layers=4, heads=8, kv_heads=4, head_dim=32, ffn=704, vocab=8192)
DEEP = Shape(hidden=256, layers=8, heads=8, kv_heads=8, head_dim=32, ffn=704, vocab=2048, tied=True)
TIME = 256
CASES = {
    "plain": (DEEP, Layout(), 1, 4, "none", False),
    "accumulated": (DEEP, Layout(), 3, 2, "none", False),
    "wide vocabulary": (WIDE_VOCABULARY, Layout(), 1, 8, "none", False),
    "selective": (DEEP, Layout(), 1, 8, "selective", False),
    "full": (WIDE_VOCABULARY, Layout(), 2, 8, "full", False),
    "gates": (DEEP, Layout(), 2, 4, "none", True),
    "gates, full": (DEEP, Layout(), 1, 4, "full", True),
    "sharded": (DEEP, Layout(shard=2), 2, 4, "none", False),
    "tensor parallel": (WIDE_VOCABULARY, Layout(tp=2), 1, 8, "none", False),
    "pipeline": (DEEP, Layout(pp=2), 4, 2, "none", False),
    "taught": (WIDE_VOCABULARY, Layout(), 1, 8, "none", False),  # by a model of its own shape
}


class Zeros:
    def __init__(self, shape: Shape) -> None:
        self.size = {param.name: param.size for param in params(Architecture(shape))}

    def read(self, name: str) -> torch.Tensor:
        return torch.zeros(self.size[name])

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(self.size[name]).narrow(axis, start, stop - start)


def measured(case: str) -> int:
    shape, layout, count, micro, checkpointing, pruning = CASES[case]
    ranks_of = topology.start(layout, torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        readout = Distill(0.5) if case == "taught" else NEXT_TOKEN
        built = build_stages(Architecture(shape), ranks_of, checkpointing, readout)
        stages = [shard(stage, Zeros(shape), ranks_of, torch.float32, torch.float32) for stage in built]
        engine = Engine(stages, ranks_of, count, micro, TIME, torch.float32)
        optimizer = adamw([p for stage in stages for p in stage.parameters()], OptimizerConfig())
        start_moments(optimizer, 0)
        gated = [Context(_masks(shape, number)) for number in range(count)] if pruning else None
        tokens = torch.randint(0, shape.vocab, (count * micro, TIME))
        if case == "taught":
            counts = count, micro, TIME
            teacher = Teacher(Architecture(shape), Zeros(shape), ranks_of, *counts, torch.float32)
            gated = teacher.teach(tokens, gated)
        engine.train(tokens, tokens, gated)
        sync.clip(stages, 1.0, ranks_of)
        optimizer.step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _masks(shape: Shape, number: int) -> Masks:
    target = Shape(128, shape.layers // 2, shape.heads, shape.kv_heads, shape.head_dim, 352, shape.vocab, shape.tied)
    return Gates(shape, target).sample(0, number).map(lambda mask: mask.detach().clone().requires_grad_())


@pytest.mark.parametrize("case", CASES)
def test_forecast_is_within_a_tenth_of_the_measured_peak(case: str) -> None:
    shape, layout, count, micro, checkpointing, pruning = CASES[case]
    found = max(ranks.run(layout.world, measured, case))
    job = Job(
        Architecture(shape), layout, count * micro * layout.dp, micro, TIME, checkpointing, 4, False, pruning, False
    )
    job = replace(job, teacher=job.architecture, teacher_bytes=4) if case == "taught" else job
    expected = peak(job)
    print(f"{case}: measured {found / 1e6:.1f} MB, forecast {expected.total / 1e6:.1f} MB")
    assert expected.total == pytest.approx(found, rel=0.1)
