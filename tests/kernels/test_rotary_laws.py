"""Rotary position embedding: kernel = reference."""

import pytest
import shear_kernels
import torch
from kernel_law import DTYPES, assert_lawful, normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 8), (3, 1, 32), (9, 3, 64), (4, 4, 96), (5, 5, 128), (6, 2, 10)]
)
@pytest.mark.parametrize("positions_by_row", [False, True])
def test_kernel_is_reference(
    heads: int, kv_heads: int, head_dim: int, positions_by_row: bool, dtype: torch.dtype
) -> None:
    batch, time = 2, 5
    angle = normal(*((batch,) if positions_by_row else ()), time, head_dim // 2, seed=3)
    tensors = {
        "q": normal(batch, time, heads, head_dim, seed=1, dtype=dtype),
        "k": normal(batch, time, kv_heads, head_dim, seed=2, dtype=dtype),
    }
    assert_lawful("rope", tensors, cos=angle.cos(), sin=angle.sin())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary"), [(16, 4), (80, 20), (10, 8)])
def test_partial_rotation(head_dim: int, rotary: int, dtype: torch.dtype) -> None:
    angle = normal(5, rotary // 2, seed=3)
    tensors = {
        "q": normal(2, 5, 3, head_dim, seed=1, dtype=dtype),
        "k": normal(2, 5, 1, head_dim, seed=2, dtype=dtype),
    }
    assert_lawful("rope", tensors, cos=angle.cos(), sin=angle.sin())


def test_strided_views_need_no_copy() -> None:
    q = normal(2, 4, 5, 16, seed=1).transpose(1, 2)  # [batch, time 5, heads 4, head_dim]
    k = normal(2, 5, 8, 16, seed=2)[:, :, ::2]
    angle = normal(5, 8, seed=3)
    assert_lawful("rope", {"q": q, "k": k}, cos=angle.cos(), sin=angle.sin())


def test_misfit_is_named() -> None:
    q = torch.ones(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"cos \(2, 4\)"):
        shear_kernels.rope(q, q, torch.ones(2, 4), torch.ones(2, 4), backend="triton")
