"""Law 4 of distillation: in any layout, loss and gradients are those of plain PyTorch with all logits in memory.

Student and teacher differ in all but their vocabulary: a masked, compact, tied LLaMA learns from a GPT-NeoX, and a
dense Qwen3 from a LLaMA.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES, InMemory, random_model, weights_of
from ranks import run
from shear_kernels import sample_teacher
from shear_kernels.sampling import in_parts, sample
from torch import Tensor
from torch.distributed.tensor import DTensor

from shear_tron.dims import sizes
from shear_tron.masks import Masks
from shear_tron.model.context import DENSE, Context, TeacherSamples, TeacherStates
from shear_tron.model.distill import Distill
from shear_tron.model.split import Split
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.tensor import keep_part
from shear_tron.parallel.topology import Layout, Topology, start
from shear_tron.train.teacher import Teacher

BATCH, MICRO_BATCH, TIME, ALPHA, TEMPERATURE = 8, 2, 6, 0.7, 2.0
PAIRS = {"llama, tied": "gpt_neox", "qwen3": "llama, grouped"}  # student: teacher
LAYOUTS = {
    "one": Layout(),
    "fsdp2": Layout(shard=2),
    "tp2": Layout(tp=2, sequence=False),
    "tp2+sp": Layout(tp=2),
    "pp2": Layout(pp=2),
    "pp2 interleaved": Layout(pp=2, schedule="interleaved", stages_per_rank=2),
    "all on 8": Layout(pp=2, shard=2, tp=2),
}
Result = dict[str, Tensor]


def batch(student: str) -> tuple[Tensor, Tensor]:
    vocab = ARCHITECTURES[student].shape.vocab
    windows = torch.randint(vocab, (BATCH, TIME + 1), generator=torch.Generator().manual_seed(1))
    labels = windows[:, 1:].clone()
    labels[3, 4:] = -100
    return windows[:, :-1], labels


def masks(student: str, microbatch: int) -> Masks:
    if student != "llama, tied":
        return Masks()
    generator = torch.Generator().manual_seed(microbatch)
    values = {}
    for kind, size in sizes(ARCHITECTURES[student].shape).items():
        value = torch.rand(size, generator=generator, dtype=torch.float64)
        value[torch.rand(size, generator=generator) < 0.3] = 0
        values[kind] = value
    values["hidden"][0] = values["layers"][0] = 1
    return Masks(**values).map(Tensor.requires_grad_)


def alone(student: str) -> Result:
    """Logits of both models, softmax, autograd."""
    model, teacher = random_model(ARCHITECTURES[student]), random_model(ARCHITECTURES[PAIRS[student]], seed=1)
    tokens, labels = batch(student)
    terms: list[list[Tensor]] = []
    found = [masks(student, number) for number in range(BATCH // MICRO_BATCH)]
    for number, under in enumerate(found):
        rows = slice(number * MICRO_BATCH, (number + 1) * MICRO_BATCH)
        logits = model(tokens[rows], context=Context(under))
        with torch.no_grad():
            wanted = (teacher(tokens[rows]) / TEMPERATURE).log_softmax(-1)
        entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="none")
        apart = TEMPERATURE**2 * (wanted.exp() * (wanted - (logits / TEMPERATURE).log_softmax(-1))).sum(-1)
        counted = labels[rows] >= 0
        both = entropy.view(MICRO_BATCH, TIME), apart
        terms.append([(loss * counted).sum(1) / counted.sum(1) for loss in both])
    entropy, divergence = (torch.cat(parts) for parts in zip(*terms, strict=True))
    ((1 - ALPHA) * entropy.mean() + ALPHA * divergence.mean()).backward()
    result = {"terms": torch.stack((entropy, divergence)).detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        result[f"grad.{name}"] = parameter.grad
    for kind, _ in found[0].items():
        leaves = [getattr(under, kind) for under in found]
        result[f"mask.{kind}"] = torch.stack([leaf.grad * (leaf != 0) for leaf in leaves]).sum(0)
    return result


def together(layout: Layout) -> dict[str, Result]:
    topology = start(layout, torch.device("cpu"))
    return {student: _together(student, topology) for student in PAIRS}


def _together(student: str, topology: Topology) -> Result:
    layout, architecture, teacher = topology.layout, ARCHITECTURES[student], ARCHITECTURES[PAIRS[student]]
    stages = build_stages(architecture, topology, "none", Distill(ALPHA, TEMPERATURE))
    weights = InMemory(weights_of(random_model(architecture)))
    stages = [shard(stage, weights, topology, torch.float64, torch.float64) for stage in stages]
    count = BATCH // MICRO_BATCH // layout.dp
    engine = Engine(stages, topology, count, MICRO_BATCH, TIME, torch.float64)
    theirs = InMemory(weights_of(random_model(teacher, seed=1)))
    taught = Teacher(teacher, theirs, topology, count, MICRO_BATCH, TIME, torch.float64)
    tokens, labels = (x.chunk(layout.dp)[topology.dp_rank] for x in batch(student))
    found = [masks(student, topology.dp_rank * count + number) for number in range(count)]
    keeps = [keep_part(m, architecture.shape, topology.tp_rank, layout.tp, 1, topology.device) for m in found]
    contexts = [Context(under, keep) for under, keep in zip(found, keeps, strict=True)]
    for layer in taught.engine.stages[0].layers.values():  # a teacher larger than fits is sharded
        assert layer.q.to_local().numel() * layout.shard * layout.tp == layer.q.numel()

    def step(teacher: Iterable[Context]) -> Result:
        for tensor in (
            *(p for part in stages for p in part.parameters()),
            *(m for own in found for _, m in own.items()),
        ):
            tensor.grad = None
        terms = engine.train(tokens, labels, teacher)
        sync.sum_tied(stages, topology)
        grads = {}
        for kind, _ in found[0].items():
            leaves = [getattr(under, kind) for under in found]
            zero = torch.zeros_like(leaves[0])
            grads[f"mask.{kind}"] = torch.stack([zero if m.grad is None else m.grad * (m != 0) for m in leaves]).sum(0)
        if grads:
            sync.sum_parts_mean_data(list(grads.values()), topology)
        for stage in stages:
            for name, parameter in stage.named_parameters():
                assert isinstance(parameter.grad, DTensor)
                grads[f"grad.{name}"] = parameter.grad.full_tensor()
        return grads | {"terms": engine.broadcast(terms, len(tokens))}

    step(taught.teach(tokens, contexts))
    result = step(taught.teach(tokens, contexts))  # the second step finds the teacher as the first
    again = engine.broadcast(engine.evaluate(tokens, labels, DENSE), len(tokens))
    assert (again[1] == 0).all()  # not known without a teacher
    cached = step(sampled(student, tokens, taught.teach(tokens, contexts), taught.engine.stages[0].split))
    for key, value in result.items():
        torch.testing.assert_close(cached[key], value, atol=1e-10, rtol=0, msg=lambda text, k=key: f"{k}: {text}")
    return result | {"dp_rank": torch.tensor(topology.dp_rank)}


def sampled(student: str, tokens: Tensor, contexts: Iterable[Context], split: Split) -> Iterator[Context]:
    """The same with as many samples as there are words, which are all of the teacher; and fewer are what they are of
    one that is whole."""
    teacher, points = random_model(ARCHITECTURES[PAIRS[student]], seed=1), torch.full((2, MICRO_BATCH * TIME), 0.3)
    for context, rows in zip(contexts, tokens.split(MICRO_BATCH), strict=True):
        if not isinstance(context.teacher, TeacherStates):
            yield context
            continue
        states, head = context.teacher.states, context.teacher.head
        with torch.no_grad():
            p = (teacher(rows).flatten(0, 1) / TEMPERATURE).softmax(-1)
        size = head.shape[0], head.shape[0] * split.size, split.all_reduce_sum
        found = sample_teacher(states, head, 5, points, TEMPERATURE, split.rank * size[0], *size[1:], chunk=5)
        ids, shares = sample(p, 5, points[0])
        assert (found[0] == ids).all()
        assert (found[1] == in_parts(shares, points[1])).all()
        information = (p * p.log()).sum(-1)
        torch.testing.assert_close(found[2], information, atol=1e-10, rtol=0)
        yield replace(context, teacher=TeacherSamples(*sample(p, size[1], points[0]), information))


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_distils_as_plain_pytorch(name: str) -> None:
    layout = LAYOUTS[name]
    expected = {student: alone(student) for student in PAIRS}
    seen = {student: set() for student in PAIRS}
    for results in run(layout.world, together, layout):
        for student, result in results.items():
            rank = int(result.pop("dp_rank"))
            for key, value in result.items():
                wanted = expected[student][key]
                wanted = wanted.chunk(layout.dp, 1)[rank] if key == "terms" else wanted
                torch.testing.assert_close(value, wanted, atol=1e-10, rtol=0, msg=lambda text, k=key: f"{k}: {text}")
            assert (result["terms"][1] > 0.01).all()
            seen[student] |= result.keys()
    assert seen == {student: set(found) for student, found in expected.items()}


def test_memory_is_linear_in_the_chunk() -> None:
    """No tensor of [tokens, vocab] is ever made."""
    from shear_kernels import vocab_distillation
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, list | tuple) else [out]:
                if isinstance(tensor, Tensor):
                    largest[0] = max(largest[0], tensor.numel())
            return out

    tokens, vocab, chunk = 512, 1000, 16
    x, head = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    with Largest():
        entropy, apart = vocab_distillation(x, head, torch.randn(tokens, 4), torch.randn(vocab, 4), labels, chunk=chunk)
        (entropy + apart).sum().backward()
    assert largest[0] == chunk * vocab
