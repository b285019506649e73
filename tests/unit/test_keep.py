"""The cut: which units it keeps, and a compact step against a masked one."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.keep import Keep
from shear_tron.masks import Masks, sizes
from shear_tron.model.transformer import Transformer
from shear_tron.params import Dim, params
from shear_tron.shape import Shape

SHAPES = {
    "plain": Shape(hidden=16, layers=4, heads=4, kv_heads=4, head_dim=4, ffn=12, vocab=24),
    "grouped": Shape(hidden=20, layers=4, heads=6, kv_heads=2, head_dim=6, ffn=14, vocab=24),
    "tied": Shape(hidden=16, layers=3, heads=9, kv_heads=3, head_dim=4, ffn=12, vocab=24, tied=True),
}


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


# --- Keep


def test_heads_are_kept_queries_of_kept_groups_in_blocks_of_head_dim() -> None:
    shape = replace(SHAPES["grouped"], layers=1, heads=9, kv_heads=3)
    masks = Masks(kv_heads=torch.tensor([[0.3, 0.0, 1.0]]), heads_per_group=torch.tensor([[0.0, 0.5, 1.0]]))
    kept = Keep.of(masks, shape).layers[0]
    assert kept.kv_heads is not None
    assert kept.heads is not None
    assert kept.kv_heads.tolist() == [0, 2]
    assert kept.heads.tolist() == [1, 2, 7, 8]
    row = torch.arange(6)
    assert torch.equal(kept.kv_head_rows, torch.cat((row, 12 + row)))
    assert torch.equal(kept.head_rows, torch.cat((6 + row, 12 + row, 42 + row, 48 + row)))


def test_nothing_pruned_keeps_all_without_a_gather() -> None:
    shape = SHAPES["tied"]
    masks = Masks(**{kind: torch.full(size, 0.5) for kind, size in sizes(shape).items()})
    for keep in (Keep.of(Masks(), shape), Keep.of(masks, shape), Keep.of(masks, shape, pad_to=64)):
        assert keep.hidden is None
        assert list(keep.layers) == [0, 1, 2]
        assert all(value is None for layer in keep.layers.values() for value in asdict(layer).values())


@pytest.mark.parametrize(
    ("whole", "hidden", "ffn"), [(1.0, 12, 9), (0.8, 12, 9), (0.75, None, None), (0.5, None, None)]
)
def test_where_nearly_all_would_be_kept_all_is(whole: float, hidden: int | None, ffn: int | None) -> None:
    keep = Keep.of(masks_of(SHAPES["plain"], {"hidden": 12, "ffn": 9}, soft=True), SHAPES["plain"], whole=whole)
    for kept, size in ((keep.hidden, hidden), *((layer.ffn, ffn) for layer in keep.layers.values())):
        assert (None if kept is None else len(kept)) == size


@pytest.mark.parametrize(("multiple", "hidden", "ffn"), [(1, 5, 3), (2, 6, 4), (4, 8, 4), (5, 5, 5), (16, None, None)])
def test_padding_is_closed_units_up_to_a_multiple(multiple: int, hidden: int | None, ffn: int | None) -> None:
    shape = SHAPES["plain"]
    masks = masks_of(shape, {"hidden": 5, "ffn": 3}, soft=True)
    plain, padded = Keep.of(masks, shape), Keep.of(masks, shape, multiple)
    pairs = [(plain.hidden, padded.hidden, hidden)]
    pairs += [(plain.layers[i].ffn, padded.layers[i].ffn, ffn) for i in range(shape.layers)]
    for before, after, size in pairs:
        assert (None if after is None else len(after)) == size
        if after is not None:
            assert set(before.tolist()) <= set(after.tolist())
            assert after.tolist() == sorted(set(after.tolist()))


def test_a_layer_that_keeps_nothing_of_a_kind_keeps_one_closed_unit() -> None:
    shape = SHAPES["plain"]
    kv_heads = torch.zeros(4, 4)
    keep = Keep.of(Masks(kv_heads=kv_heads, ffn=torch.zeros(4, 12)), shape)
    assert all(len(layer.heads) == len(layer.ffn) == 1 for layer in keep.layers.values())


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask ffn has size \[3, 12\]; a model of this shape has \[4, 12\]"):
        Keep.of(Masks(ffn=torch.ones(3, 12)), SHAPES["plain"])


def test_every_pruned_dimension_is_selected_on_every_axis() -> None:
    """By the table: an axis over HIDDEN, HEADS, KV_HEADS or FFN is cut, one over VOCAB is not."""
    shape = SHAPES["tied"]
    keep = Keep.of(masks_of(shape, {"hidden": 8, "kv_heads": 2, "heads_per_group": 2, "ffn": 5}, soft=False), shape)
    for parameter in params(shape):
        indices = keep.indices(parameter.row, parameter.layer)
        for dim, kept in zip(parameter.row.dims, indices, strict=False):
            assert (kept is None) == (dim is Dim.VOCAB)


# --- the compact step: kept units alone give the masked step's loss and gradients


def gate_values(shape: Shape) -> dict[str, Tensor]:
    """By kind, in float64: a third below 0 (closed once clamped), the rest in (0, 1); every layer is open."""
    noise = torch.Generator().manual_seed(3)
    values = {
        kind: torch.rand(size, generator=noise, dtype=torch.float64) * 1.6 - 0.6 for kind, size in sizes(shape).items()
    }
    values["layers"].fill_(0.7)
    return values


def assert_compact_is_masked(shape: Shape, values: dict[str, Tensor], multiple: int) -> None:
    """Law 11: loss, all weight gradients, all gradients of open gates."""
    model, tokens = model_of(shape), tokens_of(shape)
    masks = Masks(**values).map(lambda value: value.clamp(0, 1).requires_grad_())
    leaves = [*model.parameters(), *(mask for _, mask in masks.items())]
    masked = model(tokens[:, :-1], labels=tokens[:, 1:], masks=masks).mean()
    expected = torch.autograd.grad(masked, leaves, materialize_grads=True)

    keep = Keep.of(masks, shape, multiple)
    assert masks.layers is not None
    assert list(keep.layers) == masks.layers.nonzero().flatten().tolist()
    compact = model(tokens[:, :-1], labels=tokens[:, 1:], masks=masks, keep=keep).mean()
    found = torch.autograd.grad(compact, leaves, materialize_grads=True)  # a layer left out may use no gate at all
    torch.testing.assert_close(compact, masked, atol=1e-12, rtol=0)
    for leaf, one, other in zip(leaves, expected, found, strict=True):
        is_mask = any(leaf is mask for _, mask in masks.items())
        open_ = leaf != 0 if is_mask else torch.ones_like(leaf, dtype=torch.bool)
        torch.testing.assert_close(other[open_], one[open_], atol=1e-12, rtol=0)


@pytest.mark.parametrize("multiple", [1, 4, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_compact_step_is_the_masked_step(name: str, multiple: int) -> None:
    """With different counts in every layer, and one layer left out whole."""
    values = gate_values(SHAPES[name])
    values["layers"][1] = -1.0
    assert_compact_is_masked(SHAPES[name], values, multiple)


@pytest.mark.parametrize("multiple", [1, 4, 64])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("closed", ["layers", "kv_heads", "heads_per_group", "ffn", "hidden"])
def test_compact_step_is_the_masked_step_with_a_whole_kind_closed(closed: str, name: str, multiple: int) -> None:
    values = gate_values(SHAPES[name])
    values[closed].fill_(-1.0)
    assert_compact_is_masked(SHAPES[name], values, multiple)
