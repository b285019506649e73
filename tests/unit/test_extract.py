"""Extraction against the masked model and against Hugging Face."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, kept_of, masks_of, random_model, tokens_of
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import Weights, read_architecture, write
from shear_tron.dims import KINDS, sizes
from shear_tron.masks import Masks
from shear_tron.model.context import Context
from shear_tron.model.transformer import Transformer
from shear_tron.params import count, layer_rows, params
from shear_tron.pruning.config import PruneConfig, TargetConfig
from shear_tron.pruning.extract import extract
from shear_tron.pruning.make import make_method

PLAIN, TIED = ARCHITECTURES["llama"], ARCHITECTURES["llama, tied"]


def extracted(model: Transformer, masks: Masks) -> tuple[Architecture, dict[str, Tensor]]:
    target, tensors = extract(lambda name: model.get_parameter(name).detach(), masks, model.architecture)
    return target, dict(tensors)


def dense_of(target: Architecture, tensors: dict[str, Tensor]) -> Transformer:
    dense = Transformer(target).double()
    dense.load_state_dict(tensors, strict=True)
    return dense


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("soft", [False, True], ids=["decided", "soft"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masked_model_is_extracted_model_is_hugging_face(name: str, soft: bool, tmp_path: Path) -> None:
    """Laws 2 and 3. The logits are of size 1 to 10."""
    from transformers import AutoModelForCausalLM

    source = ARCHITECTURES[name]
    kept, tokens = kept_of(source.shape), tokens_of(source)
    model, masks = random_model(source), masks_of(source.shape, kept, soft)
    with torch.no_grad():
        masked = model(tokens, context=Context(masks))
    target, tensors = extracted(model, masks)
    for kind, number in kept.items():
        assert getattr(target.shape, kind) == number, kind
    source.shape.require_target(target.shape)
    assert sum(tensor.numel() for tensor in tensors.values()) == count(target)
    with torch.no_grad():
        assert largest_difference(dense_of(target, tensors)(tokens), masked) < 1e-12
    assert masked.abs().max() > 0.5  # or the comparison would say nothing

    write(tmp_path / "model", target, tensors.items())
    assert read_architecture(tmp_path / "model") == target
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        # Their norms and rotary angles are in float32 even in a float64 model.
        assert largest_difference(theirs(tokens).logits, masked) < 1e-6 * masked.abs().max()
    assert all(torch.equal(Weights.open(tmp_path / "model", target).read(k), v) for k, v in tensors.items())


@pytest.mark.parametrize("method", ["hard_concrete", "magnitude"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decided_masks_make_exactly_the_target(name: str, method: str) -> None:
    """Law 6, of learned gates and of scores."""
    source = ARCHITECTURES[name]
    kept = TargetConfig(hidden=2 * source.shape.head_dim, layers=3, heads=2, kv_heads=2, ffn=8)
    target = kept.shape(source.shape)
    made = make_method(PruneConfig(target=kept, method=method, warmup_steps=1), source, target, seed=0)
    for tensor in made.tensors().values():
        tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))
    assert extracted(random_model(source), made.decide())[0] == source.keep_layers(target, kept_layers(made.decide()))


def kept_layers(masks: Masks) -> list[int]:
    assert masks.layers is not None
    return masks.layers.nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_kind_alone_folds_exactly(name: str, kind: str) -> None:
    source = ARCHITECTURES[name]
    units = sizes(source.shape)[kind][-1]
    tokens, model = tokens_of(source), random_model(source)
    masks = masks_of(source.shape, {kind: max(1, units // 2)}, soft=True)
    with torch.no_grad():
        assert (
            largest_difference(dense_of(*extracted(model, masks))(tokens), model(tokens, None, Context(masks))) < 1e-12
        )


def test_layers_are_renumbered_in_order() -> None:
    source = replace(PLAIN, window=4, full_layers=frozenset({0, 3}), unturned_layers=frozenset({1, 2}))
    model = random_model(source)
    target, tensors = extracted(model, Masks(layers=torch.tensor([0.0, 1.0, 0.0, 1.0])))
    assert target.shape.layers == 2
    assert list(tensors) == [parameter.name for parameter in params(target)]
    for new, old in enumerate((1, 3)):
        for row in layer_rows(target):
            assert torch.equal(tensors[row.name(new)], model.get_parameter(row.name(old)))
    assert (target.full_layers, target.unturned_layers) == ({1}, {0})  # facts of a layer go with it


def test_decided_masks_only_cut() -> None:
    """Masks of 0 and 1 leave every kept number as it was, bit for bit, in the weights' own dtype."""
    model = random_model(TIED).to(torch.bfloat16)
    _, tensors = extracted(model, masks_of(TIED.shape, kept_of(TIED.shape), soft=False).map(Tensor.float))
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert set(tensor.flatten().tolist()) <= {
            value for old in range(4) for value in _source(model, name, old).flatten().tolist()
        }


def _source(model: Transformer, name: str, layer: int) -> Tensor:
    parts = name.split(".")
    return model.get_parameter(f"layers.{layer}.{parts[2]}" if parts[0] == "layers" else name).detach()


def test_soft_masks_fold_in_float32_whatever_the_weights_dtype() -> None:
    """A bfloat16 weight times several soft masks is rounded once."""
    source = ARCHITECTURES["gpt_neox"]
    model, masks = random_model(source), masks_of(source.shape, kept_of(source.shape), soft=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    _, exact = extracted(model, masks)
    _, rounded = extracted(model.bfloat16(), masks.map(Tensor.float))
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact[name], rtol=2**-8, atol=0)  # half a unit in the last place


def test_the_source_is_left_as_it_was() -> None:
    model = random_model(PLAIN)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    extracted(model, Masks(layers=torch.full((4,), 0.5), hidden=torch.full((24,), 0.5)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_tensors_are_read_one_at_a_time() -> None:
    model, reads = random_model(PLAIN), []

    def read(name: str) -> Tensor:
        reads.append(name)
        return model.get_parameter(name).detach()

    _, tensors = extract(read, masks_of(PLAIN.shape, kept_of(PLAIN.shape), soft=True), PLAIN)
    assert reads == []
    stream: Iterator[tuple[str, Tensor]] = iter(tensors)
    for number in range(1, 6):
        next(stream)
        assert len(reads) == number


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        (Masks(ffn=torch.eye(4, 20) + torch.eye(4, 20).roll(1, 0).triu(1)), r"layer \d keeps ffn=\d, layer \d \d"),
        (Masks(kv_heads=torch.tensor([[1.0, 1, 1, 1]] * 3 + [[1, 1, 0, 0]])), "layer 3 keeps kv_heads=2, layer 0 4"),
        (Masks(layers=torch.zeros(4)), "prune all 4 layers; keep at least 1"),
    ],
)
def test_masks_that_make_no_dense_model_are_refused(masks: Masks, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        extract(random_model(PLAIN).get_parameter, masks, PLAIN)


def test_counts_in_pruned_layers_do_not_matter() -> None:
    ffn = torch.ones(4, 20)
    ffn[2, 3:] = 0
    target, _ = extract(random_model(PLAIN).get_parameter, Masks(ffn=ffn, layers=torch.tensor([1.0, 1, 0, 1])), PLAIN)
    assert (target.shape.layers, target.shape.ffn) == (3, 20)


def test_a_misshaped_source_tensor_is_named() -> None:
    source = {p.name: torch.ones(p.size) for p in params(PLAIN)} | {"layers.0.attn_norm": torch.ones(3)}
    _, tensors = extract(source.__getitem__, Masks(), PLAIN)
    with pytest.raises(ValueError, match=r"layers\.0\.attn_norm has size \[3\]; the source's is \[24\]"):
        list(tensors)
