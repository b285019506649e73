"""select where no kernel serves: blocks of a cache's size against plain indexing, and the call's contract."""

import pytest
import shear_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shear_kernels import gather_blocks, reference


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, list[int] | None, list[int] | None]:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))

    def kept(size: int) -> list[int] | None:
        return draw(st.none() | st.sets(st.integers(0, size - 1)).map(sorted))

    cut = rows, columns, kept(rows), kept(columns)
    return cut if cut[2] is not None or cut[3] is not None else (rows, columns, [0], None)


DTYPES = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("block", [1, 64, 2**20])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(cut=cuts(), dtypes=st.sampled_from(DTYPES))
def test_blocks_are_plain_indexing(
    block: int,
    cut: tuple[int, int, list[int] | None, list[int] | None],
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> None:
    n, m, *lists = cut
    rows, columns = (None if kept is None else torch.tensor(kept, dtype=torch.int64) for kept in lists)
    weight = torch.randn(n, m).to(dtypes[0]).requires_grad_()
    plain = reference.select(weight, rows, columns, dtypes[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_blocks, "BLOCK", block)
        ours = gather_blocks.select(weight, rows, columns, dtypes[1])
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)
        grad = torch.randn_like(plain)
        found, expected = (torch.autograd.grad(out, weight, grad)[0] for out in (ours, plain))
    assert found.dtype == weight.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("block", [64, 2**20])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(cut=cuts(), others=st.lists(st.integers(1, 40), max_size=2), dtypes=st.sampled_from(DTYPES))
def test_blocks_join_like_the_definition(
    block: int,
    cut: tuple[int, int, list[int] | None, list[int] | None],
    others: list[int],
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> None:
    n, m, *lists = cut
    kept, columns = (None if kept is None else torch.tensor(kept, dtype=torch.int64) for kept in lists)
    weights = [torch.randn(size, m).to(dtypes[0]).requires_grad_() for size in (n, *others)]
    rows = [kept, *(torch.arange(0, size, 2) if columns is None else None for size in others)]
    plain = reference.select_joined(weights, rows, columns, dtypes[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_blocks, "BLOCK", block)
        ours = shear_kernels.select_joined(weights, rows, columns, dtypes[1])
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)
        grad = torch.randn_like(plain)
        found, expected = (torch.autograd.grad(out, weights, grad) for out in (ours, plain))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("block", [1, 64, 2**20])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(cut=cuts(), dtypes=st.sampled_from(DTYPES), scaled=st.sampled_from(["rows", "columns", "both"]))
def test_blocks_scale_like_the_definition(
    block: int,
    cut: tuple[int, int, list[int] | None, list[int] | None],
    dtypes: tuple[torch.dtype, torch.dtype | None],
    scaled: str,
) -> None:
    """Value and the weight's gradient to the bit; the scales' gradients are sums in another order."""
    n, m, *lists = cut
    rows, columns = (None if kept is None else torch.tensor(kept, dtype=torch.int64) for kept in lists)
    weight, row_scale, column_scale = torch.randn(n, m).to(dtypes[0]), None, None
    if scaled != "columns":
        row_scale = torch.rand(n if rows is None else len(rows)).requires_grad_()
    if scaled != "rows":
        column_scale = torch.rand(m if columns is None else len(columns)).requires_grad_()
    leaves = [t for t in (weight.requires_grad_(), row_scale, column_scale) if t is not None]
    arguments = (weight, rows, columns, dtypes[1], row_scale, column_scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_blocks, "BLOCK", block)
        ours, plain = gather_blocks.select(*arguments), reference.select(*arguments)
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)
        grad = torch.randn_like(plain)
        found, expected = (torch.autograd.grad(out, leaves, grad) for out in (ours, plain))
    assert torch.equal(found[0], expected[0])
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_scales_alone_fold_a_mask_and_multiply_in_float32() -> None:
    weight, mask = torch.randn(5, 7).bfloat16(), torch.rand(7)
    folded = shear_kernels.select(weight, None, None, column_scale=mask)
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, (weight.float() * mask).bfloat16())
    bias = shear_kernels.select(weight[0], torch.tensor([1, 4]), row_scale=mask[:2])
    assert torch.equal(bias, (weight[0, [1, 4]].float() * mask[:2]).bfloat16())


@pytest.mark.parametrize("axes", ["rows", "columns", "both", "none"])
def test_gradcheck_of_scales(axes: str) -> None:
    rows = torch.tensor([1, 2, 6]) if axes in ("rows", "both") else None
    columns = torch.tensor([0, 4]) if axes in ("columns", "both") else None
    sizes = (7, 5), (7 if rows is None else 3,), (5 if columns is None else 2,)
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    for backend in (None, "reference"):
        op = lambda w, r, c, b=backend: shear_kernels.select(w, rows, columns, None, r, c, backend=b)  # noqa: E731
        assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_vectors_keep_their_dtype(dtype: torch.dtype) -> None:
    vector = torch.randn(9).to(dtype).requires_grad_()
    kept = torch.tensor([0, 4, 8])
    part = shear_kernels.select(vector, kept)
    assert torch.equal(part, vector[kept])
    part.sum().backward()
    assert torch.equal(vector.grad, torch.zeros(9, dtype=dtype).index_fill(0, kept, 1))


def test_nothing_pruned_costs_nothing() -> None:
    for weight in (torch.randn(9), torch.randn(3, 4)):
        assert shear_kernels.select(weight, None) is weight
        assert shear_kernels.select(weight, None, None, weight.dtype) is weight
    weight = torch.randn(3, 4, requires_grad=True)
    part = shear_kernels.select(weight, None, None, torch.bfloat16)
    assert torch.equal(part, weight.bfloat16())
    part.sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))


@pytest.mark.parametrize("axes", ["rows", "columns", "both"])
def test_gradcheck(axes: str) -> None:
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows = None if axes == "columns" else torch.tensor([1, 2, 6])
    columns = None if axes == "rows" else torch.tensor([0, 4])
    assert torch.autograd.gradcheck(lambda w: shear_kernels.select(w, rows, columns), weight)


def test_a_view_is_selected_like_any_weight() -> None:
    weight = torch.randn(6, 8).t()
    rows, columns = torch.tensor([0, 3, 7]), torch.tensor([2, 5])
    assert torch.equal(gather_blocks.select(weight, rows, columns), weight[rows][:, columns])


def test_a_cpu_is_served_by_blocks_and_the_definition_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1])
    calls = []
    for module in (gather_blocks, reference):
        monkeypatch.setattr(module, "select", lambda *_, name=module.__name__: calls.append(name))
    shear_kernels.select(weight, rows)
    shear_kernels.select(weight, rows, backend="reference")
    assert calls == ["shear_kernels.gather_blocks", "shear_kernels.reference"]


@pytest.mark.parametrize(
    ("size", "rows", "columns", "message"),
    [
        ((4, 3), torch.tensor([True, False, True, True]), None, r"rows is torch.bool of size \[4\]; use int64"),
        ((4, 3), None, torch.tensor([[0]]), r"columns is torch.int64 of size \[1, 1\]; use int64"),
        ((4,), None, torch.tensor([0]), r"weight of size \[4\] has no such axes"),
        ((4, 3, 2), torch.tensor([0]), None, r"weight of size \[4, 3, 2\] has no such axes"),
    ],
)
def test_misfit_is_named(
    size: tuple[int, ...], rows: torch.Tensor | None, columns: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shear_kernels.select(torch.randn(size), rows, columns)


def test_misfits_of_what_is_joined_are_named() -> None:
    weight, rows = torch.randn(4, 3), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"weights of sizes \[4, 3\], \[3\] do not join; use \[n, m\] with one m"):
        shear_kernels.select_joined([weight, weight[0]], [rows, rows])
    with pytest.raises(ValueError, match="keeps all its rows and columns"):
        shear_kernels.select_joined([weight, weight], [rows, None])
    with pytest.raises(ValueError, match=r"rows is torch\.bool"):
        shear_kernels.select_joined([weight, weight], [rows, rows > 0])


def test_misfit_of_scales_is_named() -> None:
    weight, rows = torch.randn(4, 3), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"row_scale of size \[4\] does not fit the kept rows; use \[2\]"):
        shear_kernels.select(weight, rows, row_scale=torch.ones(4))
    with pytest.raises(ValueError, match=r"column_scale of size \[2\] does not fit the kept columns; use \[3\]"):
        shear_kernels.select(weight, rows, column_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"weight of size \[3\] has no such axes"):
        shear_kernels.select(weight[0], None, column_scale=torch.ones(3))
