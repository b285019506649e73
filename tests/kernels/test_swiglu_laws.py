"""Masked SwiGLU: kernel = reference."""

import pytest
import shear_kernels
import torch
from kernel_law import DEVICE, DTYPES, MASKS, assert_lawful, assert_same_bits, gates, normal, run
from shear_kernels import activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 8), (3, 37), (2, 19, 1040)])
def test_kernel_is_reference(shape: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    gate, up = normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=dtype)
    assert_lawful("masked_swiglu", {"gate": gate, "up": up, "mask": gates(mask, shape[-1])})


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_of_ones_is_no_mask_to_the_bit(dtype: torch.dtype) -> None:
    tensors = {"gate": normal(5, 40, seed=1, dtype=dtype), "up": normal(5, 40, seed=2, dtype=dtype)}
    masked = run(shear_kernels.masked_swiglu, tensors | {"mask": gates("ones", 40)}, None, backend="triton")
    assert_same_bits(run(shear_kernels.masked_swiglu, tensors, None, backend="triton"), masked)


def test_closed_columns_are_zero_whatever_they_hold() -> None:
    gate, up, mask = normal(6, 2060, seed=1), normal(6, 2060, seed=2), gates("soft", 2060)
    assert mask is not None
    mask[8:24], mask[1024:2048] = 0, 0  # whole groups of eight, and a whole block
    gate[:, mask == 0], up[:, mask == 0] = float("nan"), float("inf")
    results = run(shear_kernels.masked_swiglu, {"gate": gate, "up": up, "mask": mask}, None, backend="triton")
    for result in results.values():
        assert torch.isfinite(result).all()
        assert not result[..., mask == 0].any()


def test_halves_of_one_matrix_need_no_copy() -> None:
    both = normal(7, 80, seed=1)
    gate, up = both.chunk(2, dim=-1)
    assert_lawful("masked_swiglu", {"gate": gate, "up": up, "mask": gates("soft", 40)})
    ours = shear_kernels.masked_swiglu(gate, up, backend="triton")
    assert torch.equal(ours, shear_kernels.masked_swiglu(gate.contiguous(), up.contiguous(), backend="triton"))


@pytest.mark.parametrize(
    "rows_a_block", [activation.FORWARD_ROWS, activation.BACKWARD_ROWS * activation.BACKWARD_STEPS]
)
def test_a_million_tokens_can_be_launched(rows_a_block: int) -> None:
    """CUDA takes 2^31 - 1 blocks along the first axis of a grid and 65,535 along the others."""
    first, *others = activation.grid(2**20, 14336, rows_a_block)
    assert first < 2**31
    assert all(blocks < 65536 for blocks in others)


def test_no_rows() -> None:
    empty = torch.empty(0, 16, device=DEVICE)
    found = run(shear_kernels.masked_swiglu, {"gate": empty, "up": empty, "mask": gates("soft", 16)}, None)
    assert found["output 0"].shape == (0, 16)
    assert not found["d(mask)"].any()


def test_misfit_is_named() -> None:
    with pytest.raises(ValueError, match=r"mask \(5,\) do not fit"):
        shear_kernels.masked_swiglu(normal(2, 4, seed=1), normal(2, 4, seed=2), torch.ones(5), backend="triton")
