"""Masked GELU: kernel = reference."""

from typing import Any

import pytest
import shear_kernels
import torch
from kernel_law import DTYPES, MASKS, assert_lawful, assert_same_bits, gates, normal, run


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_kernel_is_reference(mask: str, dtype: torch.dtype, approximate: Any) -> None:
    x = 2 * normal(2, 7, 1040, seed=1, dtype=dtype)
    assert_lawful("masked_gelu", {"x": x, "mask": gates(mask, 1040)}, approximate=approximate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_of_ones_is_no_mask_to_the_bit(dtype: torch.dtype) -> None:
    x = {"x": normal(5, 40, seed=1, dtype=dtype)}
    masked = run(shear_kernels.masked_gelu, x | {"mask": gates("ones", 40)}, None, backend="triton")
    assert_same_bits(run(shear_kernels.masked_gelu, x, None, backend="triton"), masked)


def test_large_inputs_saturate() -> None:
    """Far out the value is x or 0 and the slope 1 or 0: nothing overflows on the way."""
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4]], requires_grad=True)
    for approximate in ("none", "tanh"):
        out = shear_kernels.masked_gelu(x, None, approximate, backend="triton")  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(out.abs(), x.clamp(min=0))
        assert torch.equal(slope.abs(), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_closed_columns_are_zero_whatever_they_hold() -> None:
    x, mask = normal(6, 2060, seed=1), gates("soft", 2060)
    assert mask is not None
    mask[8:24], mask[1024:2048] = 0, 0  # whole groups of eight, and a whole block
    x[:, mask == 0] = float("nan")
    results = run(shear_kernels.masked_gelu, {"x": x, "mask": mask}, None, backend="triton")
    for result in results.values():
        assert torch.isfinite(result).all()
        assert not result[..., mask == 0].any()


def test_misfit_is_named() -> None:
    with pytest.raises(ValueError, match=r"mask \(5,\) does not fit"):
        shear_kernels.masked_gelu(normal(2, 4, seed=1), torch.ones(5), backend="triton")
