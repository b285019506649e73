"""Law: learning from a teacher in any layout is plain PyTorch's: losses and gradients to 1e-10 in float64."""

import pytest
import torch
from ranks import run
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shear_tron.architecture import Architecture
from shear_tron.dims import sizes
from shear_tron.masks import Masks
from shear_tron.model.context import Context
from shear_tron.model.distill import Distill
from shear_tron.model.transformer import Transformer
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.tensor import keep_part
from shear_tron.parallel.topology import Layout, start
from shear_tron.shape import Shape
from shear_tron.train.teacher import Teacher

STUDENT = Architecture(Shape(hidden=24, layers=4, heads=8, kv_heads=4, head_dim=6, ffn=20, vocab=40, tied=True))
TEACHER = Architecture(Shape(hidden=30, layers=4, heads=4, kv_heads=4, head_dim=8, ffn=24, vocab=40))
BATCH, TIME, ALPHA, TEMPERATURE = 8, 6, 0.7, 2.0
LAYOUTS = {
    "one": Layout(),
    "fsdp2": Layout(shard=2),
    "tp4": Layout(tp=4, sequence=False),
    "tp2+sp": Layout(tp=2),
    "pp2 interleaved": Layout(pp=2, schedule="interleaved", stages_per_rank=2),
    "all on 8": Layout(pp=2, shard=2, tp=2),
}
Result = dict[str, Tensor]


class InMemory:
    def __init__(self, architecture: Architecture, seed: int) -> None:
        torch.manual_seed(seed)
        model = Transformer(architecture).double()
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def model(self, architecture: Architecture) -> Transformer:
        model = Transformer(architecture).double()
        model.load_state_dict(self.weights)
        return model

    def read(self, name: str) -> Tensor:
        return self.weights[name].clone()

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        return self.weights[name].narrow(axis, start, stop - start).clone()


def batch() -> tuple[Tensor, Tensor]:
    windows = torch.randint(40, (BATCH, TIME + 1), generator=torch.Generator().manual_seed(1))
    labels = windows[:, 1:].clone()
    labels[3, 4:] = -100
    return windows[:, :-1], labels


def masks(microbatch: int) -> Masks:
    """A third of the units closed, the others soft."""
    generator = torch.Generator().manual_seed(100 + microbatch)
    values = {}
    for kind, size in sizes(STUDENT.shape).items():
        value = torch.rand(size, generator=generator, dtype=torch.float64)
        value[torch.rand(size, generator=generator) < 0.3] = 0
        values[kind] = value
    values["hidden"][0] = values["layers"][0] = 1
    return Masks(**values)


def alone() -> Result:
    """Plain PyTorch: two models' logits, softmax and logarithm."""
    student, teacher = InMemory(STUDENT, 0).model(STUDENT), InMemory(TEACHER, 1).model(TEACHER)
    tokens, labels = batch()
    terms = []
    for i in range(BATCH):
        s = student(tokens[i : i + 1], context=Context(masks(i)))[0]
        with torch.no_grad():
            t = teacher(tokens[i : i + 1])[0]
        counted = labels[i] >= 0
        entropy = torch.nn.functional.cross_entropy(s[counted], labels[i][counted])
        p = (t / TEMPERATURE).softmax(-1)
        gap = (p * (p.log() - (s / TEMPERATURE).log_softmax(-1))).sum(-1) * TEMPERATURE**2
        terms.append(torch.stack((entropy, gap[counted].mean())))
    losses = torch.stack(terms, 1)
    ((1 - ALPHA) * losses[0].mean() + ALPHA * losses[1].mean()).backward()
    return {"losses": losses.detach()} | {name: p.grad for name, p in student.named_parameters()}


def together(layout: Layout) -> Result:
    topology = start(layout, torch.device("cpu"))
    stages = build_stages(STUDENT, topology, "none", Distill(ALPHA, TEMPERATURE))
    stages = [shard(stage, InMemory(STUDENT, 0), topology, torch.float64, torch.float64) for stage in stages]
    count = BATCH // layout.dp
    engine = Engine(stages, topology, count, 1, TIME, torch.float64)
    teacher = Teacher(TEACHER, InMemory(TEACHER, 1), topology, count, 1, TIME, torch.float64)
    tokens, labels = (x.chunk(layout.dp)[topology.dp_rank] for x in batch())
    contexts = []
    for number in range(topology.dp_rank * count, (topology.dp_rank + 1) * count):
        own = masks(number)
        kept = keep_part(own, STUDENT.shape, topology.tp_rank, layout.tp, 1, topology.device)
        contexts.append(Context(own.map(lambda mask: mask.requires_grad_()), kept))
    for _ in range(2):  # the second step finds the teacher as the first did
        for stage in stages:
            stage.zero_grad()
        losses = engine.broadcast(engine.train(tokens, labels, teacher.teach(tokens, labels, contexts)), len(tokens))
    evaluated = engine.broadcast(engine.evaluate(tokens, labels, contexts[0]), len(tokens))
    assert (evaluated[1] == 0).all()  # no teacher at evaluations
    sync.sum_tied(stages, topology)
    result = {"losses": losses, "dp_rank": torch.tensor(topology.dp_rank)}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter.grad, DTensor), name
            result[name] = parameter.grad.full_tensor()
    return result


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_learns_what_one_process_would(layout: Layout) -> None:
    expected, seen = alone(), set()
    for result in run(layout.world, together, layout):
        rank = int(result.pop("dp_rank"))
        for name, value in result.items():
            wanted = expected[name].chunk(layout.dp, 1)[rank] if name == "losses" else expected[name]
            torch.testing.assert_close(value, wanted, atol=1e-10, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
            seen.add(name)
    assert seen == expected.keys()
