"""select: the kernels are plain indexing, to the bit, since they only move data."""

from functools import partial
from pathlib import Path

import pytest
import shear_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_law import DEVICE, assert_same_bits, normal, run
from shear_kernels import gather, reference
from torch import Tensor

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FP32, BF16), (BF16, BF16), (FP32, FP32), (FP16, FP16), (FP32, FP16), (BF16, FP32), (FP16, BF16)]
AXES = ["rows", "columns", "both"]


def some(size: int, seed: int, sort: bool = True) -> Tensor:
    """About half of the indices below ``size``, at least one."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: (size + 1) // 2]
    return (order.sort().values if sort else order).to(DEVICE)


def kept(n: int, m: int, axes: str, sort: bool = True) -> tuple[Tensor | None, Tensor | None]:
    return None if axes == "columns" else some(n, 3, sort), None if axes == "rows" else some(m, 4, sort)


def assert_plain(
    weight: Tensor, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype | None, dout: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Kernel = definition, forward and backward. Returns the kernel's result and gradient."""
    weight = weight.detach().requires_grad_()  # a view stays one
    ours = shear_kernels.select(weight, rows, columns, dtype, backend="triton")
    plain = reference.select(weight, rows, columns, dtype)
    if dout is None:
        dout = normal(*plain.shape, seed=9).to(plain.dtype)
    found, expected = (torch.autograd.grad(out, weight, dout)[0] for out in (ours, plain))
    for mine, theirs in ((ours, plain), (found, expected)):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    return ours.detach(), found


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (19, 1100)])
def test_kernel_is_plain_indexing(shape: tuple[int, int], axes: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    assert_plain(normal(*shape, seed=1, dtype=dtypes[0]), *kept(*shape, axes), dtypes[1])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 40), st.integers(1, 1300), st.sampled_from(DTYPES), st.booleans())
def test_any_cut(data: st.DataObject, n: int, m: int, dtypes: tuple[torch.dtype, torch.dtype], sort: bool) -> None:
    def drawn(size: int) -> Tensor | None:
        share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]))
        if share is None:
            return None
        order = torch.randperm(size, generator=torch.Generator().manual_seed(size))[: round(share * size)]
        return (order.sort().values if sort else order).to(DEVICE)

    rows, columns = drawn(n), drawn(m)
    if rows is not None or columns is not None:
        assert_plain(normal(n, m, seed=1, dtype=dtypes[0]), rows, columns, dtypes[1])


@pytest.mark.parametrize("axes", AXES)
def test_order_of_the_indices_is_the_order_of_the_result(axes: str) -> None:
    assert_plain(normal(21, 600, seed=1), *kept(21, 600, axes, sort=False), BF16)


@pytest.mark.parametrize("axes", AXES)
def test_views_of_weight_and_gradient(axes: str) -> None:
    """Transposed, a slice of columns, every other row; gradients transposed and expanded."""
    whole = normal(40, 600, seed=1)
    for weight in (whole.t(), whole[:, 3:90], whole[::2, ::3]):
        assert_plain(weight, *kept(*weight.shape, axes), BF16)
    rows, columns = kept(40, 600, axes)
    size = reference.select(whole, rows, columns).shape
    for dout in (normal(*reversed(size), seed=2).t(), torch.ones((), device=DEVICE).expand(size)):
        assert_plain(whole, rows, columns, FP32, dout)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_every_bit_is_kept_in_the_same_dtype(dtype: torch.dtype) -> None:
    """Signs of zero, infinities, subnormals, payloads of NaN: all patterns of 16 bits, or as many of 32."""
    integer = torch.int32 if dtype == FP32 else torch.int16
    bits = torch.arange(-(2**15), 2**15).to(integer).view(64, 1024).to(DEVICE) * (65537 if dtype == FP32 else 1)
    rows, columns = kept(64, 1024, "both")
    weight = bits.view(dtype).requires_grad_()
    ours = shear_kernels.select(weight, rows, columns, backend="triton")
    assert torch.equal(ours.detach().view(integer), reference.select(bits, rows, columns))
    dout = ours.detach().clone()
    (found,) = torch.autograd.grad(ours, weight, dout)
    expected = torch.zeros_like(bits)
    expected[rows[:, None], columns] = dout.view(integer)
    assert torch.equal(found.view(integer), expected)


def test_rounding_is_to_nearest_even() -> None:
    halves = (torch.arange(0x3F800000, 0x3F800000 + 2**17, 2**13, dtype=torch.int32)).view(FP32).to(DEVICE)
    weight = torch.stack((halves, -halves, halves * 1e-40, halves * 3e38))  # ties, subnormals, overflow
    assert_plain(weight, some(4, 1), None, BF16)
    assert_plain(weight, torch.arange(4, device=DEVICE), some(16, 1), BF16)


def test_what_is_not_kept_is_not_touched() -> None:
    """Closed entries may hold NaN; their gradient is exactly 0 though every new tensor is filled with NaN."""
    weight, (rows, columns) = normal(30, 1100, seed=1), kept(30, 1100, "both")
    closed = torch.ones_like(weight, dtype=torch.bool)
    closed[rows[:, None], columns] = False
    ours, gradient = assert_plain(weight.masked_fill(closed, float("nan")), rows, columns, BF16)
    assert torch.isfinite(ours).all()
    assert not gradient[closed].any()
    assert gradient[~closed].any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (5, 7)])
@pytest.mark.parametrize("axes", AXES)
def test_nothing_to_keep(shape: tuple[int, int], axes: str) -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    rows, columns = None if axes == "columns" else none, None if axes == "rows" else none
    _, gradient = assert_plain(normal(*shape, seed=1), rows, columns, BF16)
    assert gradient.shape == shape


@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("axes", [*AXES, "none"])
@pytest.mark.parametrize("scaled", AXES)
def test_scales(scaled: str, axes: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The same bits for the part and the weight's gradient; the scales' gradients are float32 sums of 1,100 terms."""
    rows, columns = (None, None) if axes == "none" else kept(19, 1100, axes)
    tensors = {
        "weight": normal(19, 1100, seed=1, dtype=dtypes[0]),
        "row_scale": None if scaled == "columns" else normal(19 if rows is None else len(rows), seed=2),
        "column_scale": None if scaled == "rows" else normal(1100 if columns is None else len(columns), seed=3),
    }
    cut = {"rows": rows, "columns": columns, "dtype": dtypes[1]}
    ours = run(partial(shear_kernels.select, **cut, backend="triton"), tensors, None)
    plain = run(partial(reference.select, **cut), tensors, None)
    assert_same_bits({n: ours.pop(n) for n in ("output 0", "d(weight)")}, plain)
    assert ours
    for name, found in ours.items():
        torch.testing.assert_close(found, plain[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("axes", AXES)
def test_joined_parts_lie_one_under_another(axes: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Of weights of different heights, one a view and one that keeps no row, to the bit."""
    whole = normal(40, 1100, seed=1, dtype=dtypes[0])
    weights = [whole[:19], normal(7, 1100, seed=2, dtype=dtypes[0]), whole[::2]]
    weights = [weight.detach().requires_grad_() for weight in weights]
    rows = [None if axes == "columns" else some(len(weight), 3) for weight in weights]
    if axes == "both":
        rows[1:] = [rows[1][:0], None]  # type: ignore[index]
    columns = None if axes == "rows" else some(1100, 4)
    ours = shear_kernels.select_joined(weights, rows, columns, dtypes[1], backend="triton")
    plain = reference.select_joined(weights, rows, columns, dtypes[1])
    dout = normal(*plain.shape, seed=9).to(dtypes[1])
    assert ours.dtype == plain.dtype
    assert torch.equal(ours, plain)
    gradients = (torch.autograd.grad(out, weights, dout) for out in (ours, plain))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_vectors_and_float64_are_exact() -> None:
    rows, columns = kept(9, 12, "both")
    assert_plain(normal(9, seed=1), rows, None, BF16)
    double = normal(9, 12, seed=1).double() / 3
    assert_plain(double, rows, columns, None)
    assert_plain(double, rows, columns, FP32)
    assert_plain(normal(9, 12, seed=1), rows, columns, torch.float64)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """A weight and a gradient of 3 x 2^30 entries each, sparse on disk: entries 2^31 and more from the first."""
    size, width = 3 * 2**30, 2**30
    if DEVICE == "cuda":
        flat = torch.zeros(size, dtype=BF16, device=DEVICE)
    else:
        flat = torch.from_file(str(tmp_path / "weight"), shared=True, size=size, dtype=BF16)
        (tmp_path / "weight").unlink()
    weight = flat.view(3, width)
    columns = torch.tensor([0, 17, width - 1], device=DEVICE)
    weight[:, columns] = normal(3, 3, seed=1, dtype=BF16)
    rows = torch.tensor([0, 2], device=DEVICE)
    plain = weight[rows][:, columns] if DEVICE == "cuda" else torch.stack([weight[r][columns] for r in rows])
    assert torch.equal(shear_kernels.select(weight, rows, columns, backend="triton"), plain)
    turned = flat.view(width, 3).t()  # columns 3 apart
    assert torch.equal(shear_kernels.select(turned, rows, columns, backend="triton"), turned[rows[:, None], columns])
    dout = weight[:, :5]
    target = torch.empty(6, 5, dtype=FP32, device=DEVICE, requires_grad=True)
    kept_rows = torch.tensor([5, 0, 3], device=DEVICE)
    part = shear_kernels.select(target, kept_rows, None, BF16, backend="triton")
    (found,) = torch.autograd.grad(part, target, dout)
    assert torch.equal(found[kept_rows], dout.float())


@pytest.mark.parametrize(("rows", "columns"), [(gather.ROWS, gather.COLUMNS), (gather.ROWS + 1, gather.COLUMNS + 1)])
def test_whole_blocks_and_one_more(rows: int, columns: int) -> None:
    weight = normal(2 * rows, 2 * columns, seed=1)
    assert_plain(weight, torch.arange(rows, device=DEVICE), torch.arange(columns, device=DEVICE), BF16)
    assert_plain(weight[:rows, :columns].contiguous(), torch.arange(rows, device=DEVICE), None, BF16)
