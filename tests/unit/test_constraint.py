"""The Lagrange constraint: the released implementation's numbers, its gradients, and that it reaches the target."""

import json
from pathlib import Path

import pytest
import torch

from shear_tron.architecture import Architecture
from shear_tron.dims import KINDS, sizes
from shear_tron.params import layer_rows, params
from shear_tron.pruning.constraint import Constraint, parameter_groups
from shear_tron.pruning.gates import LIMIT, Gates
from shear_tron.shape import Shape

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "hard_concrete.json").read_text())
ORIGINAL = {"hidden": "hidden", "layers": "layer", "kv_heads": "head", "ffn": "intermediate"}  # ours -> the original's
MULTI_HEAD = Shape(hidden=64, layers=4, heads=8, kv_heads=8, head_dim=8, ffn=96, vocab=32)
MULTI_HEAD_TARGET = Shape(hidden=32, layers=3, heads=4, kv_heads=4, head_dim=8, ffn=48, vocab=32)
GROUPED = Shape(hidden=12, layers=5, heads=12, kv_heads=4, head_dim=4, ffn=17, vocab=32)
GROUPED_TARGET = Shape(hidden=7, layers=3, heads=4, kv_heads=2, head_dim=4, ffn=9, vocab=32)
TOLERANCE = (
    1e-6  # the vectors are float32 results of order 1: off by up to some 1e-7 themselves, so compared absolutely
)
STEPS = [record["step"] for record in VECTORS["lag"]]


def original() -> tuple[Gates, Constraint]:
    """Float64 gates and multipliers at the vectors' values."""
    gates = Gates(MULTI_HEAD, MULTI_HEAD_TARGET, dtype=torch.float64)
    gates.load_state_dict({kind: torch.tensor(VECTORS["loga"][name]).double() for kind, name in ORIGINAL.items()})
    gates.clamp_()
    constraint = Constraint(Architecture(MULTI_HEAD), MULTI_HEAD_TARGET, VECTORS["warmup"], dtype=torch.float64)
    lambdas = VECTORS["lambdas"]
    pairs = {kind: [lambdas[f"lambda_1_{name}"], lambdas[f"lambda_2_{name}"]] for kind, name in ORIGINAL.items()}
    constraint.load_state_dict({kind: torch.tensor(pair, dtype=torch.float64) for kind, pair in pairs.items()})
    return gates, constraint


@pytest.mark.parametrize("record", VECTORS["lag"], ids=STEPS)
def test_penalty_and_report_reproduce_the_released_code(record: dict) -> None:
    gates, constraint = original()
    penalty, report = constraint.penalty(gates, record["step"])
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(record["loss"], rel=0, abs=TOLERANCE)
    renamed = {"expected_sparsity": "expected_sparsity", "target_sparsity": "target_sparsity"}
    for kind, name in ORIGINAL.items():
        renamed |= {f"{role}_{kind}_sparsity": f"{role}_{name}_sparsity" for role in ("expected", "target")}
    assert {renamed[key]: value for key, value in report.items()} == pytest.approx(record["info"], rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("record", VECTORS["lag"], ids=STEPS)
@pytest.mark.parametrize("kind", ORIGINAL)
def test_gradients_reproduce_the_released_code(kind: str, record: dict) -> None:
    gates, constraint = original()
    constraint.penalty(gates, record["step"])[0].backward()
    name = ORIGINAL[kind]
    expected = torch.tensor(record["grad_loga"][name], dtype=torch.float64)
    actual = gates.logits[kind].grad
    assert actual is not None
    torch.testing.assert_close(actual.flatten(), expected, rtol=0, atol=TOLERANCE)
    # These gradients are small, so hold them to float32's relative precision as well.
    assert (actual.flatten() - expected).norm() <= 5e-6 * expected.norm()
    pair = constraint.multipliers[kind].grad
    assert pair is not None
    wanted = [record["grad_lambda"][f"lambda_1_{name}"], record["grad_lambda"][f"lambda_2_{name}"]]
    assert pair.tolist() == pytest.approx(wanted, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (1, 1 / 8), (4, 0.5), (8, 1.0), (9, 1.0), (10**6, 1.0)])
def test_wanted_sparsity_grows_linearly_over_the_warmup(step: int, share: float) -> None:
    wanted = Constraint(Architecture(GROUPED), GROUPED_TARGET, warmup_steps=8).wanted(step)
    assert set(wanted) == set(KINDS)
    for kind, sparsity in wanted.items():
        kept = sizes(GROUPED_TARGET)[kind][-1] / sizes(GROUPED)[kind][-1]
        assert sparsity == pytest.approx(share * (1 - kept)), kind


def test_without_warmup_the_target_is_wanted_at_once() -> None:
    assert Constraint(Architecture(GROUPED), GROUPED_TARGET, 0).wanted(0) == Constraint(
        Architecture(GROUPED), GROUPED_TARGET, 5
    ).wanted(5)


def test_a_negative_warmup_is_named() -> None:
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        Constraint(Architecture(GROUPED), GROUPED_TARGET, -1)


def test_penalty_passes_gradcheck_with_grouped_queries() -> None:
    gates = Gates(GROUPED, GROUPED_TARGET, dtype=torch.float64)
    constraint = Constraint(Architecture(GROUPED), GROUPED_TARGET, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in (*gates.logits.values(), *constraint.multipliers.values()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    parameters = (*gates.logits.values(), *constraint.multipliers.values())
    assert torch.autograd.gradcheck(lambda *_: constraint.penalty(gates, 3)[0], parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kinds_sparsity_is_the_closed_fraction_of_its_units(kind: str) -> None:
    gates, constraint = Gates(GROUPED, GROUPED_TARGET), Constraint(Architecture(GROUPED), GROUPED_TARGET, 8)
    gates.logits[kind].data.uniform_(-LIMIT, LIMIT, generator=torch.Generator().manual_seed(1))
    report = constraint.penalty(gates, 0)[1]
    probabilities = getattr(gates.expected(), kind)
    assert report[f"expected_{kind}_sparsity"] == pytest.approx(1 - probabilities.mean().item(), abs=1e-6)


def test_every_layer_is_held_to_the_target_by_the_square() -> None:
    """Two layers that err in opposite directions cancel in the linear term, never in the quadratic one."""
    source = Shape(hidden=8, layers=2, heads=2, kv_heads=2, head_dim=2, ffn=10, vocab=2)
    target = Shape(hidden=8, layers=2, heads=2, kv_heads=2, head_dim=2, ffn=5, vocab=2)
    gates, constraint = (
        Gates(source, target, dtype=torch.float64),
        Constraint(Architecture(source), target, 0, dtype=torch.float64),
    )
    gates.logits["ffn"].data[1] = -100.0
    mean_excess = 1 - gates.expected().ffn.mean() - 0.5
    for multipliers, holds in (([1.0, 0.0], False), ([0.0, 1.0], True)):
        constraint.load_state_dict({"ffn": torch.tensor(multipliers)})
        penalty = constraint.penalty(gates, 0)[0].item()
        assert (penalty > 0.2) == holds
        if not holds:
            assert penalty == pytest.approx(mean_excess.item())


def test_every_block_is_held_to_the_target_when_balanced() -> None:
    source = Shape(hidden=8, layers=1, heads=2, kv_heads=2, head_dim=2, ffn=8, vocab=2)
    target = Shape(hidden=8, layers=1, heads=2, kv_heads=2, head_dim=2, ffn=4, vocab=2)
    penalties = []
    for balance in (1, 2):
        gates, constraint = Gates(source, target, balance=balance), Constraint(Architecture(source), target, 0)
        gates.logits["ffn"].data[0, :4] = -100.0  # half of the columns, all of them the first tensor-parallel rank's
        constraint.load_state_dict({"ffn": torch.tensor([0.0, 1.0])})
        penalties.append(constraint.penalty(gates, 0)[0].item())
    assert penalties[0] < 0.01
    assert penalties[1] > 0.2


@pytest.mark.parametrize(("source", "target"), [(GROUPED, GROUPED_TARGET), (MULTI_HEAD, MULTI_HEAD_TARGET)])
def test_total_sparsity_counts_the_parameters_of_the_layers_matrices(source: Shape, target: Shape) -> None:
    matrices = {row.leaf for row in layer_rows(Architecture(source)) if len(row.dims) == 2}
    count = [
        sum(torch.Size(param.size).numel() for param in params(Architecture(shape)) if param.row.leaf in matrices)
        for shape in (source, target)
    ]
    report = Constraint(Architecture(source), target, 8).penalty(Gates(source, target), 8)[1]
    assert report["target_sparsity"] == pytest.approx(1 - count[1] / count[0])


@pytest.mark.parametrize(("source", "target"), [(GROUPED, GROUPED_TARGET), (MULTI_HEAD, MULTI_HEAD_TARGET)])
def test_expected_sparsity_is_summed_over_every_weight(source: Shape, target: Shape) -> None:
    gates, constraint = Gates(source, target, dtype=torch.float64), Constraint(Architecture(source), target, 8)
    generator = torch.Generator().manual_seed(0)
    for logits in gates.logits.values():
        logits.data.uniform_(-LIMIT, LIMIT, generator=generator)
    masks = gates.expected()
    acting, total = 0.0, 0
    for index in range(source.layers):
        layer = masks.layer(index, source)
        assert layer.hidden is not None
        assert layer.heads is not None
        assert layer.ffn is not None
        assert layer.layer is not None
        assert masks.kv_heads is not None
        heads = layer.heads.repeat_interleave(source.head_dim)
        kv_heads = masks.kv_heads[index].repeat_interleave(source.head_dim)
        for rows, matrices in ((heads, 2), (kv_heads, 2), (layer.ffn, 3)):
            weights = matrices * layer.layer * torch.outer(rows, layer.hidden)
            acting += weights.sum().item()
            total += matrices * weights.numel()
    report = constraint.penalty(gates, 0)[1]
    assert report["expected_sparsity"] == pytest.approx(1 - acting / total, abs=1e-12)


def test_parameter_groups_descend_on_logits_and_ascend_on_multipliers() -> None:
    gates, constraint = Gates(GROUPED, GROUPED_TARGET), Constraint(Architecture(GROUPED), GROUPED_TARGET, 0)
    weight = torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [weight], "lr": 1e-4}, *parameter_groups(gates, constraint, 1.0)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    assert [group["maximize"] for group in optimizer.param_groups] == [False, False, True]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1.0, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    for step in range(2):
        optimizer.zero_grad()
        constraint.penalty(gates, step)[0].backward()
        optimizer.step()
    for kind, (linear, quadratic) in constraint.multipliers.items():
        assert linear < 0, kind  # too little is pruned: the price of pruning falls below 0 ...
        assert quadratic > 0, kind
        assert (gates.logits[kind] < LIMIT).all(), kind  # ... and the gates begin to close


def test_ascent_equals_the_released_codes_negative_rate() -> None:
    gradients = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    rising = torch.optim.AdamW([{"params": [ours], "maximize": True}], lr=1.0, weight_decay=0.0)
    negative = torch.optim.AdamW([{"params": [theirs], "lr": -1.0}], weight_decay=0.0)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        rising.step()
        negative.step()
    assert torch.equal(ours, theirs)


def test_state_round_trip_and_refusal() -> None:
    constraint, other = (
        Constraint(Architecture(GROUPED), GROUPED_TARGET, 8),
        Constraint(Architecture(GROUPED), GROUPED_TARGET, 8),
    )
    constraint.multipliers["ffn"].data.copy_(torch.tensor([1.5, -2.5]))
    other.load_state_dict({kind: tensor.clone() for kind, tensor in constraint.state_dict().items()})
    assert other.multipliers["ffn"].tolist() == [1.5, -2.5]
    with pytest.raises(ValueError, match="expected exactly"):
        other.load_state_dict({"ffn": torch.zeros(2)})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_training_reaches_the_target_and_keeps_the_important_units(seed: int) -> None:
    """No model: closing a unit costs its importance. The paper's schedule (640 of 3200 steps), four times as fast."""
    source = Shape(hidden=64, layers=12, heads=32, kv_heads=8, head_dim=2, ffn=96, vocab=2)
    target = Shape(hidden=32, layers=8, heads=8, kv_heads=4, head_dim=2, ffn=48, vocab=2)
    gates, constraint = Gates(source, target, seed=seed), Constraint(Architecture(source), target, warmup_steps=160)
    generator = torch.Generator().manual_seed(seed)
    importance = {kind: 0.1 * torch.rand(size, generator=generator) for kind, size in sizes(source).items()}
    optimizer = torch.optim.AdamW(parameter_groups(gates, constraint, 1.0))
    gaps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(800):
        masks = gates.sample(step, 0)
        loss = sum((importance[kind] * (1 - mask)).sum() for kind, mask in masks.items())
        penalty, report = constraint.penalty(gates, step)
        optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        gates.clamp_()
        if step >= 750:
            for kind in KINDS:
                gaps[kind].append(report[f"expected_{kind}_sparsity"] - report[f"target_{kind}_sparsity"])
    for kind, mask in gates.decide().items():
        assert abs(sum(gaps[kind]) / 50) <= 0.02, kind
        kept = importance[kind][mask != 0].sum()
        best = importance[kind].topk(gates.counts[kind], -1).values.sum()
        chance = importance[kind].sum() * gates.counts[kind] / mask.shape[-1]
        share = ((kept - chance) / (best - chance)).item()
        if kind in (
            "hidden",
            "kv_heads",
            "ffn",
        ):  # of the others too few for a noisy choice to be sharp
            assert share >= 0.7, kind  # 0 is a random choice, 1 the best
