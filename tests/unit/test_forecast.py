"""Plans on paper: operations as torch counts them, orders that must hold, targets that can be sheared to."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shear_tron import cli
from shear_tron.architecture import Architecture
from shear_tron.forecast.command import number
from shear_tron.forecast.devices import device
from shear_tron.forecast.job import Job
from shear_tron.forecast.known import SHAPES
from shear_tron.forecast.layouts import ranked
from shear_tron.forecast.memory import peak
from shear_tron.forecast.target import propose
from shear_tron.forecast.time import computed, step
from shear_tron.model.context import DENSE, TeacherStates
from shear_tron.model.distill import Distill, FinalStates
from shear_tron.model.flops import flops
from shear_tron.model.transformer import Transformer
from shear_tron.parallel.topology import Layout
from shear_tron.params import count
from shear_tron.shape import Shape

ROOT = Path(__file__).parents[2]
SMALL = Shape(hidden=16, layers=3, heads=4, kv_heads=2, head_dim=4, ffn=12, vocab=24)
LLAMA = Architecture(SHAPES["llama-2-7b"], context=4096)
EIGHT = Layout(shard=8)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_torch_counts(checkpointing: str, tied: bool) -> None:
    shape, time = replace(SMALL, tied=tied), 8
    job = Job(Architecture(shape), Layout(), 2, 2, time, checkpointing)  # type: ignore[arg-type]
    model = Transformer(job.architecture, checkpointing=checkpointing)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.zeros(2, time, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op))
    assert products == computed(job)[0]


def test_what_the_review_of_the_engine_added_up_by_hand() -> None:
    """7B on 8 GPUs, microbatches of 4096 tokens: 13.5 GB of weights, gradients and moments, 27 of unsharded sums, 22.7
    of activations, up to 11.4 of kept copies. Since then the gated residual is one kernel, which keeps 6 bytes less per
    token and hidden column: 3.2 GB of the activations. A compact step folds masks into weights: what a branch adds is
    not kept, 2.1 GB, but what ends a branch is kept once more before it is scaled, up to 3.5 GB."""
    job = Job(LLAMA, EIGHT, 32, 1, 4096, pruning=True)
    parts = peak(job).parts
    states = (parts["weights"] + parts["Adam's moments"]) * 4 / 3  # the gradient's shard is there at the end only
    assert states / 1e9 == pytest.approx(13.5, abs=0.1)
    assert parts["unsharded gradients"] / 1e9 == pytest.approx(27, abs=0.1)
    assert parts["activations"] / 1e9 == pytest.approx(22.7 - 3.2 - 2.1, rel=0.1)
    assert parts["copies of weights"] / 1e9 == pytest.approx(11.4 + 3.5, rel=0.02)
    assert peak(replace(job, checkpointing="full")).parts["copies of weights"] < 1e9


def test_saving_memory_costs_time_and_closing_gates_saves_it() -> None:
    h100 = device("h100")
    jobs = [Job(LLAMA, EIGHT, 32, 1, 4096, kind, pruning=True) for kind in ("none", "selective", "full")]  # type: ignore[arg-type]
    memory, seconds = [peak(job).total for job in jobs], [step(job, h100).seconds for job in jobs]
    assert memory == sorted(memory, reverse=True)
    assert seconds == sorted(seconds)
    closed = step(jobs[0], h100, Shape(2048, 24, 16, 16, 128, 5504, 32000))
    assert 0.15 < closed.seconds / seconds[0] < 0.5
    assert 0.2 < step(jobs[0], h100).mfu(h100, 8) < 0.6


@pytest.mark.slow
def test_twice_the_gpus_are_never_slower_and_never_twice_as_fast() -> None:
    h100, job = device("h100"), Job(LLAMA, EIGHT, 1024, 1, 4096)
    best = [ranked(job, gpus, h100, None, 0.0)[0][0].seconds for gpus in (8, 16, 32)]
    for slower, faster in pairwise(best):
        assert 1.0 < slower / faster <= 2.02


@pytest.mark.parametrize(
    ("source", "parameters", "tp"), [("llama-2-7b", 1.3e9, 8), ("llama-2-7b", 2.7e9, 4), ("llama-3.1-8b", 3.6e9, 4)]
)
def test_targets_can_be_sheared_to(source: str, parameters: float, tp: int) -> None:
    for shape in propose(Architecture(SHAPES[source]), parameters, tp):
        SHAPES[source].require_target(shape)
        assert count(Architecture(shape)) == pytest.approx(parameters, rel=0.03)
        assert shape.hidden % shape.heads == 0  # transformers' rule
        assert shape.hidden % 128 == shape.ffn % 64 == shape.kv_heads % tp == 0


def test_the_papers_target_is_among_the_proposals() -> None:
    paper = Shape(2560, 32, 20, 20, 128, 6912, 32000)
    assert paper in propose(LLAMA, count(Architecture(paper)))


@pytest.mark.slow
def test_plan_of_both_stages_before_the_second_model_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stages = [f"examples/sheared-llama/{name}-1.3b.yaml" for name in ("prune", "continue")]
    assert cli.main(["plan", *stages, "--gpus", "16"]) == 0
    told = capsys.readouterr().out
    assert "6.738 billion parameters -> 1.345 billion" in told
    assert "stage 2, examples/sheared-llama/continue-1.3b.yaml: 1.345 billion parameters" in told
    assert "GPU-hours" in told.splitlines()[-1]
    reason = "no layout of 13 GPUs divides train.batch=1, layers=32, kv_heads=32; give a larger train.batch"
    assert cli.main(["plan", stages[0], "--gpus", "13", "train.batch=1", "train.micro_batch=1"]) == 0
    assert reason in capsys.readouterr().out


@pytest.mark.slow
def test_a_teachers_operations_are_those_torch_counts() -> None:
    """Its layers forward, and its logits once, which the loss makes."""
    tokens, student = torch.zeros(2, 8, dtype=torch.int64), Transformer(Architecture(SMALL), readout=Distill(0.5))
    teacher = Transformer(Architecture(SMALL), readout=FinalStates())
    for parameter in (*student.parameters(), *teacher.parameters()):
        torch.nn.init.normal_(parameter)
    counts = []
    for taught in (False, True):
        with FlopCounterMode(display=False) as counter:
            given = DENSE
            if taught:
                with torch.no_grad():
                    states = teacher(tokens, tokens)
                assert isinstance(teacher.readout, FinalStates)
                given = replace(DENSE, teacher=TeacherStates(states, teacher.readout.head))
            student(tokens, tokens, given)
        counts.append(sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op)))
    attention = 2 * 16 * 8 * SMALL.heads * SMALL.head_dim * SMALL.layers  # causal half of two products
    assert counts[1] - counts[0] == flops(Architecture(SMALL), range(SMALL.layers), True, 16, 8) // 3 - attention


def test_a_teacher_costs_memory_and_a_forward(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(LLAMA, EIGHT, 32, 1, 4096, "full")
    taught, h100 = replace(job, teacher=LLAMA), device("h100")
    shards, outside = 2 * count(LLAMA) / 8, 2 * 2 * 32000 * 4096
    assert peak(taught).parts["teacher"] == pytest.approx(shards + outside + 2 * 4096 * 4096, rel=0.01)
    more = step(taught, h100).seconds / step(job, h100).seconds
    assert 1.15 < more < 1.35  # a forward is a third of a step, or a quarter of one that recomputes
    monkeypatch.chdir(ROOT)
    config = "examples/sheared-llama/prune-1.3b.yaml"
    assert cli.main(["plan", config, "--gpus", "8", "distill.teacher=llama-2-7b"]) == 0
    assert "with a teacher of 6.738 billion" in capsys.readouterr().out
    assert cli.main(["plan", config, "--gpus", "8", "distill.teacher=llama-2-7b", "distill.cache=samples"]) == 0
    assert "with a teacher" not in capsys.readouterr().out


def test_plan_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "llama-2-7b", "--parameters", "1.3B", "--gpus", "8"]) == 0
    told = capsys.readouterr().out
    assert "target    {hidden: 2048" in told
    assert "stage 2, assumed: " in told


def test_a_table_may_say_that_further_ranks_cost_nothing(tmp_path: Path) -> None:
    rates = ["memory", "peak", "products", "attention", "bandwidth", "within_node", "between_nodes", "per_node"]
    (tmp_path / "table.yaml").write_text(f"mine: {{{', '.join(f'{key}: 8' for key in rates)}, hop: 0}}\n")
    assert device("mine", str(tmp_path / "table.yaml")).hop == 0


def test_small_numbers_are_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    architecture |= {"intermediate_size": 128, "vocab_size": 320, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    (tmp_path / "run.yaml").write_text(
        f"run: {tmp_path}/run\nmodel: {tmp_path}\ndata: {{folder: data, sequence: 16}}\ntrain: {{steps: 9, batch: 8}}\n"
    )
    assert cli.main(["plan", str(tmp_path / "run.yaml"), "--gpus", "2"]) == 0
    told = capsys.readouterr().out
    assert "stage    < 1 min" in told
    assert " ms, " in told
    assert not re.search(r" 0\.0+ |e-0", told)


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would_make_it_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "devices.yaml"
    table.write_text(
        "small: {memory: 12e9, peak: 1e14, products: 5e13, attention: 2e13, bandwidth: 1e12, within_node: 2e10, "
        "between_nodes: 1e10, hop: 1e-5, per_node: 2}\n"
    )
    given = ["plan", "--model", "llama-2-7b", "--parameters", "1.3B", "--gpu", "small", "--devices", str(table)]
    assert cli.main([*given, "--gpus", "2"]) == 0
    assert "nothing fits: the nearest" in capsys.readouterr().out
    assert cli.main(["plan", "--model", "llama-2-7b", "--parameters", "1.3B", "--gpu", "tiny"]) == 2
    assert "--gpu=tiny is not in" in capsys.readouterr().err


def test_numbers_with_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert [number(text) for text in ("1.3B", "135m", "2e9", "40k")] == [1.3e9, 135e6, 2e9, 40e3]
    assert cli.main(["plan", "--model", "llama-2-7b", "--parameters", "large"]) == 2
    assert "'large' is not a number" in capsys.readouterr().err
