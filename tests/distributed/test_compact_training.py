"""Law: a pruning run that leaves closed units out of its steps ends where the run that only masks them ends.

So it is for every model, and for every method of making masks, each with its own reference.

Twenty steps as ``Trainer`` makes them, but in float64, on one rank and on eight. All kinds of structure close, whole
layers stay out of whole steps, and a padded run keeps some closed units on purpose. Losses, masks, weights, gates and
multipliers are those of one rank that only masks, within 1e-10, whatever the layout.

Rounding is amplified on the way, since what a step learns decides the next step's masks: differences of 1e-16 at first
are up to 1e-12 in the gates at the end and 1e-14 in the weights. The chain of steps does this more than the epsilons of
Adam, which are the product's own: a larger one for the masks does not help.
"""

from functools import cache
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, InMemory, random_model, weights_of
from ranks import run
from torch import Tensor
from torch.distributed.tensor import DTensor

from shear_tron.dims import CUT_KINDS, KINDS, sizes
from shear_tron.parallel import sync
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, Topology, start
from shear_tron.pruning.config import PruneConfig, TargetConfig
from shear_tron.train.pruner import WHOLE, Pruner

SUBJECT = "llama, tied"  # runs by every method, in every layout; the others by the paper's, on one rank, not so long
TARGET = TargetConfig(hidden=8, layers=1, heads=2, kv_heads=2, ffn=4)
STEPS, OTHER_STEPS, BATCH, MICRO_BATCH, TIME = 20, 14, 8, 2, 6
RATE, CLIP = 1e-3, 1.0

RUNS: dict[str, dict[str, Any]] = {
    "masked": {"compact": False},
    "compact": {"compact": True, "pad_to": 1},
    "padded": {"compact": True, "pad_to": 4},
}
SCORED = ("fisher", "magnitude", "random")
for method in SCORED:
    gradual = {"method": method, "warmup_steps": 12, "calibration_batches": 2, "balance": 2}
    RUNS |= {f"{method}, {name}": RUNS[name] | gradual for name in ("masked", "compact")}
LAYOUTS = {
    "one": Layout(),
    "all on 8": Layout(pp=2, shard=2, tp=2),
    "replicas, interleaved": Layout(pp=2, replicate=2, tp=2, sequence=False, schedule="interleaved", stages_per_rank=2),
    "deep pipeline": Layout(pp=4, tp=2),  # ranks in its middle hold one layer, and nothing once that is left out
}
CASES = [  # layout, model, run
    ("one", SUBJECT, "masked"),  # the reference
    ("one", SUBJECT, "compact"),
    ("one", SUBJECT, "padded"),
    ("all on 8", SUBJECT, "masked"),
    ("all on 8", SUBJECT, "compact"),
    ("replicas, interleaved", SUBJECT, "padded"),
    ("deep pipeline", SUBJECT, "compact"),
    *(("one", SUBJECT, f"{method}, masked") for method in SCORED),
    *(("one", SUBJECT, f"{method}, compact") for method in SCORED),
    ("replicas, interleaved", SUBJECT, "fisher, masked"),
    *(("all on 8", SUBJECT, f"{method}, compact") for method in SCORED),
    ("deep pipeline", SUBJECT, "fisher, compact"),
]
OTHERS = [model for model in ARCHITECTURES if model != SUBJECT]
CASES += [("one", model, name) for model in OTHERS for name in ("masked", "compact")]

Result = dict[str, Tensor]


def start_weights(model: str) -> InMemory:
    """The weights to start from, the same on every rank."""
    return InMemory(weights_of(random_model(ARCHITECTURES[model])))


def pruned(model: str) -> list[str]:
    """The kinds of which the target keeps fewer."""
    source = ARCHITECTURES[model].shape
    before, after = sizes(source), sizes(TARGET.shape(source))
    return [kind for kind in KINDS if before[kind][-1] != after[kind][-1]]


def train(model: str, prune: PruneConfig, topology: Topology) -> Result:
    """One run of ``model`` on this rank, each step as ``Trainer`` makes it: what it saw, and all that it learned.

    The way: ``losses`` [steps, sequences], ``masks.KIND`` [steps, microbatches, ...], ``width`` [steps, microbatches],
    the hidden columns a microbatch ran on, and ``expected``, their share that was to be; of this rank's share of the
    batch.
    """
    source, weights = ARCHITECTURES[model], start_weights(model)
    shape = source.shape
    stages = build_stages(source, topology, "none")
    stages = [shard(stage, weights, topology, torch.float64, torch.float64) for stage in stages]
    share, dp_rank = BATCH // topology.layout.dp, topology.dp_rank
    count = share // MICRO_BATCH
    engine = Engine(stages, topology, count, MICRO_BATCH, TIME, torch.float64)
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    # Weight decay tells a gradient of zero, which decays the weight and the moments, from no gradient at all.
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    pruner = Pruner(source, TARGET.shape(shape), prune, 0, topology, torch.float64)
    way: list[Result] = []
    for step in range(-pruner.config.batches_before, STEPS if model == SUBJECT else OTHER_STEPS):
        if step == 0:
            pruner.begin(weights.read)
        generator = torch.Generator().manual_seed(3000 + step)
        windows = torch.randint(shape.vocab, (BATCH, TIME + 1), generator=generator).split(share)[dp_rank]
        expected = pruner.method.expected().hidden
        assert expected is not None
        drawn = pruner.sample(step, range(dp_rank * count, (dp_rank + 1) * count))
        losses = engine.train(windows[:, :-1], windows[:, 1:], drawn)
        sync.sum_tied(stages, topology)
        sync.clip(stages, CLIP, topology)
        pruner.backward(step, drawn)
        pruner.step(1.0)
        if step >= 0:
            optimizer.step()
        optimizer.zero_grad()
        if step < 0:  # calibration
            continue
        widths = [
            shape.hidden if under.keep is None or under.keep.hidden is None else len(under.keep.hidden)
            for under in drawn.gated
        ]
        kinds = pruned(model)
        sampled = drawn.sampled
        seen = {f"masks.{kind}": torch.stack([getattr(masks, kind).detach() for masks in sampled]) for kind in kinds}
        seen["losses"] = engine.broadcast(losses, share)[0]
        seen["expected"] = expected.mean().detach().expand(count)  # share of hidden columns open
        way.append(seen | {"width": torch.tensor(widths)})
    result = {name: torch.stack([seen[name] for seen in way]) for name in way[0]}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter, DTensor)
            result[name] = parameter.detach().full_tensor()
    return result | pruner.tensors() | {"dp_rank": torch.tensor(dp_rank)}


def train_all(layout: Layout, cases: list[tuple[str, str]]) -> list[Result]:
    topology = start(layout, torch.device("cpu"))
    return [
        train(model, PruneConfig(target=TARGET, **{"warmup_steps": 1} | RUNS[name]), topology) for model, name in cases
    ]


@cache
def trained(layout: str) -> list[dict[tuple[str, str], Result]]:
    """By rank, the runs that ``CASES`` names of a layout: by model and name."""
    cases = [(model, name) for place, model, name in CASES if place == layout]
    results = run(LAYOUTS[layout].world, train_all, LAYOUTS[layout], cases)
    return [dict(zip(cases, each, strict=True)) for each in results]


def reference(model: str = SUBJECT, name: str = "masked") -> Result:
    """The run of one rank that only masks, by the method of run ``name``."""
    method, comma, _ = name.partition(", ")
    return trained("one")[0][model, f"{method}, masked" if comma else "masked"]


def of_rank(name: str, whole: Tensor, dp: int, dp_rank: int) -> Tensor:
    """What a data-parallel rank knows of a value of the one rank: of the way, its own share of each step's batch."""
    on_the_way = name in ("losses", "width") or name.startswith("masks.")
    return whole.chunk(dp, dim=1)[dp_rank] if on_the_way else whole


def test_the_run_prunes() -> None:
    """Or the law would hold of nothing."""
    masks = {kind: reference()[f"masks.{kind}"] for kind in KINDS}
    assert all((mask[0] == 0).double().mean() < 0.05 for mask in masks.values())
    assert all((mask[-1] == 0).double().mean() > 0.5 for mask in masks.values())
    soft = [((mask > 0) & (mask < 1)).double().mean() for mask in masks.values()]
    assert min(soft) > 0.05  # gates learn
    out = (masks["layers"] == 0).all(1)  # [steps, layers], of all microbatches of a step
    assert out.sum() > 10
    assert out[:, 1:-1].any(0).any()  # a layer that a rank in the middle of the deep pipeline holds alone
    assert (out[:-1] & ~out[1:]).any()  # and layers come back
    moved = {name: (reference()[name] - weight).abs().max() for name, weight in start_weights(SUBJECT).weights.items()}
    assert min(moved.values()) > RATE


@pytest.mark.parametrize("model", OTHERS)
def test_the_runs_of_other_models_prune(model: str) -> None:
    for kind in pruned(model):
        mask = reference(model)[f"masks.{kind}"]
        assert (mask[0] == 0).double().mean() < 0.05
        assert (mask[-1] == 0).double().mean() > 0.1, kind
        assert ((mask > 0) & (mask < 1)).double().mean() > 0.05
    assert (reference(model)["masks.layers"] == 0).all(1).any()  # a layer is left out by all microbatches of a step


@pytest.mark.parametrize("method", SCORED)
def test_a_run_by_score_prunes_to_exact_counts_and_reopens_nothing(method: str) -> None:
    """In every layer, and in each half of its key-value heads and columns, at every step; evenly over microbatches."""
    result, target = reference(SUBJECT, f"{method}, masked"), sizes(TARGET.shape(ARCHITECTURES[SUBJECT].shape))
    for kind in pruned(SUBJECT):
        open_ = result[f"masks.{kind}"] == 1
        assert torch.equal(open_, result[f"masks.{kind}"] != 0)  # no soft values
        assert (open_ == open_[:, :1]).all()
        assert not (~open_[:-1] & open_[1:]).any()
        size = open_.shape[-1]
        for step, now in enumerate(open_[:, 0]):
            closed = 1 - (1 - min(1.0, step / 12)) ** 3
            blocks = now.unflatten(-1, (2 if kind in CUT_KINDS else 1, -1))
            each = blocks.shape[-1]
            kept = each - round((each - target[kind][-1] * each // size) * closed)
            assert (blocks.sum(-1) == kept).all(), (kind, step)
    assert len(result["masks.ffn"][-1, 0].unique(dim=0)) > 1  # layers choose for themselves


@pytest.mark.parametrize(("layout", "model", "name"), [case for case in CASES if case[::2] != ("one", "masked")])
def test_the_run_ends_where_one_masked_rank_ends(layout: str, model: str, name: str) -> None:
    expected, dp, seen = reference(model, name), LAYOUTS[layout].dp, set()
    for result in (runs[model, name] for runs in trained(layout)):
        for key in result.keys() - {"width", "expected", "dp_rank"}:
            wanted = of_rank(key, expected[key], dp, int(result["dp_rank"]))
            torch.testing.assert_close(
                result[key], wanted, atol=1e-10, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
            )
            seen.add(key)
    assert seen == expected.keys() - {"width", "expected", "dp_rank"}


@pytest.mark.parametrize(("layout", "model", "name"), CASES)
def test_the_run_leaves_out_what_it_should(layout: str, model: str, name: str) -> None:
    """Hidden columns that each microbatch ran on: all if masked, the open ones if compact, up to a multiple of 4.

    In steps that are expected to keep nearly all, all are.
    """
    hidden = ARCHITECTURES[model].shape.hidden
    opened = (reference(model, name)["masks.hidden"] != 0).sum(-1)
    multiple = {"masked": hidden, "compact": 1, "padded": 4}[name.rpartition(", ")[2]]
    whole = -(-opened // multiple) * multiple
    assert (whole == opened).all() == name.endswith("compact")
    for result in (runs[model, name] for runs in trained(layout)):
        own = of_rank("width", whole, LAYOUTS[layout].dp, int(result["dp_rank"])).clamp(max=hidden)
        assert torch.equal(result["width"], own.where(result["expected"] < WHOLE, hidden))
