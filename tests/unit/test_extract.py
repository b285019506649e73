"""Extraction against the masked model and against Hugging Face."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import Weights, write
from shear_tron.masks import KINDS, Masks, sizes
from shear_tron.model.transformer import Transformer
from shear_tron.params import LAYER_TABLE, count, params
from shear_tron.pruning.extract import extract
from shear_tron.shape import Shape

SHAPES = {
    "plain": Shape(hidden=16, layers=4, heads=4, kv_heads=4, head_dim=4, ffn=12, vocab=24),
    "grouped": Shape(hidden=20, layers=4, heads=6, kv_heads=2, head_dim=6, ffn=14, vocab=24),
    "tied": Shape(hidden=16, layers=3, heads=9, kv_heads=3, head_dim=4, ffn=12, vocab=24, tied=True),
}
KEPT = {  # units kept of each kind; heads of the results divide hidden, as transformers asks
    "plain": {"hidden": 12, "layers": 3, "kv_heads": 3, "ffn": 7},
    "grouped": {"hidden": 12, "layers": 2, "kv_heads": 1, "heads_per_group": 2, "ffn": 5},
    "tied": {"hidden": 12, "layers": 2, "kv_heads": 2, "heads_per_group": 2, "ffn": 8},
    "all": {"hidden": 16, "layers": 4, "kv_heads": 4, "ffn": 12},
    "only_ffn": {"ffn": 6},
    "only_layers": {"layers": 1},
    "only_queries": {"heads_per_group": 1},
}
CASES = [
    *((name, name) for name in SHAPES),
    ("plain", "all"),
    ("grouped", "only_ffn"),
    ("tied", "only_layers"),
    ("tied", "only_queries"),
]


def masks_of(shape: Shape, kept: dict[str, int], soft: bool, seed: int = 0) -> Masks:
    """Masks in float64 that keep these many units of each kind, others in every layer, of 1 or (soft) less."""
    noise = torch.Generator().manual_seed(seed)
    made = {}
    for kind, number in kept.items():
        size = sizes(shape)[kind]
        order = torch.rand(size, generator=noise, dtype=torch.float64).argsort(-1).argsort(-1)
        value = torch.rand(size, generator=noise, dtype=torch.float64) * 0.8 + 0.1 if soft else 1.0
        made[kind] = (order < number).double() * value
    return Masks(**made)


def model_of(shape: Shape, seed: int = 0) -> Transformer:
    noise = torch.Generator().manual_seed(seed)
    model = Transformer(Architecture(shape, context=64)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=noise, dtype=torch.float64) * 0.4 + 0.1
    return model


def tokens_of(shape: Shape) -> Tensor:
    return torch.randint(0, shape.vocab, (2, 11), generator=torch.Generator().manual_seed(5))


def extracted(model: Transformer, masks: Masks) -> tuple[Shape, dict[str, Tensor]]:
    target, tensors = extract(lambda name: model.get_parameter(name).detach(), masks, model.architecture.shape)
    return target, dict(tensors)


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("soft", [False, True], ids=["decided", "soft"])
@pytest.mark.parametrize(("name", "kept"), CASES)
def test_masked_model_is_extracted_model_is_hugging_face(name: str, kept: str, soft: bool, tmp_path: Path) -> None:
    """Laws 2 and 3. The logits are of size 1 to 10."""
    shape, tokens = SHAPES[name], tokens_of(SHAPES[name])
    model, masks = model_of(shape), masks_of(shape, KEPT[kept], soft)
    with torch.no_grad():
        masked = model(tokens, masks=masks)
    target, tensors = extracted(model, masks)

    numbers = KEPT[kept]
    kv_heads, heads_per_group = (
        numbers.get("kv_heads", shape.kv_heads),
        numbers.get("heads_per_group", shape.heads_per_group),
    )
    assert target == replace(
        shape,
        hidden=numbers.get("hidden", shape.hidden),
        layers=numbers.get("layers", shape.layers),
        heads=kv_heads * heads_per_group,
        kv_heads=kv_heads,
        ffn=numbers.get("ffn", shape.ffn),
    )
    shape.require_target(target)
    assert sum(tensor.numel() for tensor in tensors.values()) == count(target)

    architecture = replace(model.architecture, shape=target)
    dense = Transformer(architecture).double()
    dense.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        assert largest_difference(dense(tokens), masked) < 1e-12
    assert masked.abs().max() > 0.5  # or the comparison would say nothing

    if target.hidden % target.heads == 0:
        write(tmp_path / "model", architecture, tensors.items())
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
        with torch.no_grad():
            # Their norms and rotary angles are in float32 even in a float64 model.
            assert largest_difference(theirs(tokens).logits, masked) < 1e-6 * masked.abs().max()
        assert all(torch.equal(Weights.open(tmp_path / "model", architecture).read(k), v) for k, v in tensors.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_each_kind_alone_folds_exactly(name: str, kind: str) -> None:
    shape, tokens = SHAPES[name], tokens_of(SHAPES[name])
    model, masks = (
        model_of(shape),
        masks_of(shape, {kind: 1 if kind in ("kv_heads", "heads_per_group") else 2}, soft=True),
    )
    target, tensors = extracted(model, masks)
    dense = Transformer(replace(model.architecture, shape=target)).double()
    dense.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        assert largest_difference(dense(tokens), model(tokens, masks=masks)) < 1e-12


def test_layers_are_renumbered_in_order() -> None:
    shape = SHAPES["plain"]
    model = model_of(shape)
    target, tensors = extracted(model, Masks(layers=torch.tensor([0.0, 1.0, 0.0, 1.0])))
    assert target.layers == 2
    assert list(tensors) == [parameter.name for parameter in params(target)]
    for new, old in enumerate((1, 3)):
        for row in LAYER_TABLE:
            assert torch.equal(tensors[row.name.format(new)], model.get_parameter(row.name.format(old)))


def test_decided_masks_only_cut() -> None:
    """Masks of 0 and 1 leave every kept number as it was, bit for bit, in the weights' own dtype."""
    shape = SHAPES["tied"]
    model = model_of(shape).to(torch.bfloat16)
    _, tensors = extracted(model, masks_of(shape, KEPT["tied"], soft=False).map(Tensor.float))
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert set(tensor.flatten().tolist()) <= {
            value for old in range(3) for value in _source(model, name, old).flatten().tolist()
        }


def _source(model: Transformer, name: str, layer: int) -> Tensor:
    parts = name.split(".")
    return model.get_parameter(f"layers.{layer}.{parts[2]}" if parts[0] == "layers" else name).detach()


def test_soft_masks_fold_in_float32_whatever_the_weights_dtype() -> None:
    """A bfloat16 weight times several soft masks is rounded once."""
    shape = SHAPES["grouped"]
    model, masks = model_of(shape), masks_of(shape, KEPT["grouped"], soft=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    _, exact = extracted(model, masks)
    _, rounded = extracted(model.bfloat16(), masks.map(Tensor.float))
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact[name], rtol=2**-8, atol=0)  # half a unit in the last place


def test_the_source_is_left_as_it_was() -> None:
    shape = SHAPES["grouped"]
    model = model_of(shape)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    extracted(model, Masks(layers=torch.full((4,), 0.5), hidden=torch.full((20,), 0.5)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_tensors_are_read_one_at_a_time() -> None:
    shape = SHAPES["plain"]
    model, reads = model_of(shape), []

    def read(name: str) -> Tensor:
        reads.append(name)
        return model.get_parameter(name).detach()

    _, tensors = extract(read, masks_of(shape, KEPT["plain"], soft=True), shape)
    assert reads == []
    stream: Iterator[tuple[str, Tensor]] = iter(tensors)
    for number in range(1, 6):
        next(stream)
        assert len(reads) == number


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        (Masks(ffn=torch.eye(4, 12) + torch.eye(4, 12).roll(1, 0).triu(1)), r"layer \d keeps ffn=\d, layer \d \d"),
        (Masks(kv_heads=torch.tensor([[1.0, 1, 1, 1]] * 3 + [[1, 1, 0, 0]])), "layer 3 keeps kv_heads=2, layer 0 4"),
        (Masks(layers=torch.zeros(4)), "prune all 4 layers; keep at least 1"),
    ],
)
def test_masks_that_make_no_dense_model_are_refused(masks: Masks, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        extract(model_of(SHAPES["plain"]).get_parameter, masks, SHAPES["plain"])


def test_counts_in_pruned_layers_do_not_matter() -> None:
    ffn = torch.ones(4, 12)
    ffn[2, 3:] = 0
    target, _ = extract(
        model_of(SHAPES["plain"]).get_parameter, Masks(ffn=ffn, layers=torch.tensor([1.0, 1, 0, 1])), SHAPES["plain"]
    )
    assert (target.layers, target.ffn) == (3, 12)


def test_a_misshaped_source_tensor_is_named() -> None:
    shape = SHAPES["plain"]
    source = {p.name: torch.ones(p.size) for p in params(shape)} | {"layers.0.attn_norm": torch.ones(3)}
    _, tensors = extract(source.__getitem__, Masks(), shape)
    with pytest.raises(ValueError, match=r"layers\.0\.attn_norm has size \[3\]; the source's is \[16\]"):
        list(tensors)
