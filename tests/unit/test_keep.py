"""The cut: which units it keeps, and a compact step against a masked one."""

from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES, PLAIN, masks_of, random_model, tokens_of
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.dims import Dim, indices, sizes
from shear_tron.keep import Keep, KeepLayer
from shear_tron.masks import LayerMasks, Masks
from shear_tron.model.context import Context
from shear_tron.params import Row, params
from shear_tron.shape import Shape

# --- Keep


def test_heads_are_kept_queries_of_kept_groups_in_blocks_of_head_dim() -> None:
    shape = replace(PLAIN, layers=1, heads=9, kv_heads=3)
    masks = Masks(kv_heads=torch.tensor([[0.3, 0.0, 1.0]]), heads_per_group=torch.tensor([[0.0, 0.5, 1.0]]))
    kept = Keep.of(masks, shape).layers[0]
    assert kept.units[Dim.KV_HEADS].tolist() == [0, 2]
    assert kept.units[Dim.HEADS].tolist() == [1, 2, 7, 8]
    row = torch.arange(6)
    assert torch.equal(kept.axes[Dim.KV_HEADS], torch.cat((row, 12 + row)))
    assert torch.equal(kept.axes[Dim.HEADS], torch.cat((6 + row, 12 + row, 42 + row, 48 + row)))


def test_nothing_pruned_keeps_all_without_a_gather() -> None:
    shape = PLAIN
    masks = Masks(**{kind: torch.full(size, 0.5) for kind, size in sizes(shape).items()})
    for keep in (Keep.of(Masks(), shape), Keep.of(masks, shape), Keep.of(masks, shape, pad_to=64)):
        assert keep.hidden is None
        assert list(keep.layers) == [0, 1, 2, 3]
        assert all(layer == KeepLayer() for layer in keep.layers.values())


@pytest.mark.parametrize(
    ("whole", "hidden", "ffn"), [(1.0, 18, 15), (0.8, 18, 15), (0.75, None, None), (0.5, None, None)]
)
def test_where_nearly_all_would_be_kept_all_is(whole: float, hidden: int | None, ffn: int | None) -> None:
    keep = Keep.of(masks_of(PLAIN, {"hidden": 18, "ffn": 15}, soft=True), PLAIN, whole=whole)
    for kept, size in ((keep.hidden, hidden), *((layer.axes.get(Dim.FFN), ffn) for layer in keep.layers.values())):
        assert (None if kept is None else len(kept)) == size


@pytest.mark.parametrize(("multiple", "hidden", "ffn"), [(1, 5, 3), (2, 6, 4), (4, 8, 4), (5, 5, 5), (24, None, None)])
def test_padding_is_closed_units_up_to_a_multiple(multiple: int, hidden: int | None, ffn: int | None) -> None:
    masks = masks_of(PLAIN, {"hidden": 5, "ffn": 3}, soft=True)
    plain, padded = Keep.of(masks, PLAIN), Keep.of(masks, PLAIN, multiple)
    pairs = [(plain.hidden, padded.hidden, hidden)]
    layers = zip(plain.layers.values(), padded.layers.values(), strict=True)
    pairs += [(before.axes[Dim.FFN], after.axes.get(Dim.FFN), ffn) for before, after in layers]
    for before, after, size in pairs:
        assert (None if after is None else len(after)) == size
        if after is not None:
            assert set(before.tolist()) <= set(after.tolist())
            assert after.tolist() == sorted(set(after.tolist()))


def test_a_layer_that_keeps_nothing_of_a_kind_keeps_one_closed_unit() -> None:
    keep = Keep.of(Masks(kv_heads=torch.zeros(4, 4), ffn=torch.zeros(4, 20)), PLAIN)
    assert all(len(layer.units[Dim.HEADS]) == len(layer.units[Dim.FFN]) == 1 for layer in keep.layers.values())


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask ffn has size \[3, 20\]; a model of this shape has \[4, 20\]"):
        Keep.of(Masks(ffn=torch.ones(3, 20)), PLAIN)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_pruned_dimension_is_selected_on_every_axis(name: str) -> None:
    """By the table: an axis over HIDDEN, HEADS, KV_HEADS or FFN is cut, one over VOCAB or HEAD_DIM is not."""
    source = ARCHITECTURES[name]
    kept = {"hidden": 8, "kv_heads": 2, "ffn": 5}
    keep = Keep.of(masks_of(source.shape, kept, soft=False), source.shape)
    for parameter in params(source):
        axes = (keep.outside if parameter.layer is None else keep.layer(parameter.layer)).axes
        for dim in parameter.row.dims:
            assert (dim not in axes) == (dim in (Dim.VOCAB, Dim.HEAD_DIM))


def test_a_weight_of_three_dimensions_is_cut_and_scaled_by_the_same_code() -> None:
    """As an expert's would be: [key-value heads x head_dim, ffn, hidden], scaled by the columns it reads."""
    shape = replace(PLAIN, layers=1)
    masks = masks_of(shape, {"hidden": 5, "kv_heads": 2, "ffn": 3}, soft=True)
    row = Row("experts", (Dim.KV_HEADS, Dim.FFN, Dim.HIDDEN), frozenset({Dim.FFN, Dim.HIDDEN}))
    weight = torch.randn(row.size(shape), dtype=torch.float64)
    keep = Keep.of(masks, shape).layer(0)
    own = LayerMasks(masks.hidden[masks.hidden != 0], None, masks.ffn[0, masks.ffn[0] != 0])
    cut = keep.select(weight, row, own)
    rows = indices(Dim.KV_HEADS.factors, shape, {"kv_heads": masks.kv_heads[0].nonzero().flatten().numpy()})
    scaled = weight * masks.ffn[0][:, None] * masks.hidden
    open_ffn, open_hidden = masks.ffn[0] != 0, masks.hidden != 0
    torch.testing.assert_close(cut, scaled[rows][:, open_ffn][:, :, open_hidden], atol=1e-15, rtol=0)


# --- the compact step: kept units alone give the masked step's loss and gradients


def gate_values(shape: Shape) -> dict[str, Tensor]:
    """By kind, in float64: a third below 0 (closed once clamped), the rest in (0, 1); every layer is open."""
    noise = torch.Generator().manual_seed(3)
    values = {
        kind: torch.rand(size, generator=noise, dtype=torch.float64) * 1.6 - 0.6 for kind, size in sizes(shape).items()
    }
    values["layers"].fill_(0.7)
    return values


def assert_compact_is_masked(source: Architecture, values: dict[str, Tensor], multiple: int) -> None:
    """Law 11: loss, all weight gradients, all gradients of open gates."""
    model, tokens = random_model(source), tokens_of(source)
    masks = Masks(**values).map(lambda value: value.clamp(0, 1).requires_grad_())
    leaves = [*model.parameters(), *(mask for _, mask in masks.items())]
    masked = model(tokens[:, :-1], tokens[:, 1:], Context(masks)).mean()
    expected = torch.autograd.grad(masked, leaves, materialize_grads=True)

    keep = Keep.of(masks, source.shape, multiple)
    assert masks.layers is not None
    assert list(keep.layers) == masks.layers.nonzero().flatten().tolist()
    compact = model(tokens[:, :-1], tokens[:, 1:], Context(masks, keep)).mean()
    found = torch.autograd.grad(compact, leaves, materialize_grads=True)  # a layer left out may use no gate at all
    torch.testing.assert_close(compact, masked, atol=1e-12, rtol=0)
    for leaf, one, other in zip(leaves, expected, found, strict=True):
        is_mask = any(leaf is mask for _, mask in masks.items())
        open_ = leaf != 0 if is_mask else torch.ones_like(leaf, dtype=torch.bool)
        torch.testing.assert_close(other[open_], one[open_], atol=1e-12, rtol=0)


@pytest.mark.parametrize("multiple", [1, 4, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compact_step_is_the_masked_step(name: str, multiple: int) -> None:
    """With different counts in every layer, and one layer left out whole."""
    values = gate_values(ARCHITECTURES[name].shape)
    values["layers"][1] = -1.0
    assert_compact_is_masked(ARCHITECTURES[name], values, multiple)


@pytest.mark.parametrize("multiple", [1, 4, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("closed", ["layers", "kv_heads", "heads_per_group", "ffn", "hidden"])
def test_compact_step_is_the_masked_step_with_a_whole_kind_closed(closed: str, name: str, multiple: int) -> None:
    values = gate_values(ARCHITECTURES[name].shape)
    values[closed].fill_(-1.0)
    assert_compact_is_masked(ARCHITECTURES[name], values, multiple)
