"""Masked layer norm and the gated residual addition: kernel = reference."""

import pytest
import shear_kernels
import torch
from kernel_law import DEVICE, DTYPES, MASKS, assert_lawful, assert_same_bits, gates, normal, run
from shear_kernels import reference
from test_norm_laws import LAYERS, stream
from torch import Tensor


def inputs(shape: tuple[int, ...], kind: str, dtype: torch.dtype, bias: bool = True) -> dict[str, Tensor | None]:
    mask = gates(kind, shape[-1])
    return {
        "x": stream(shape, mask, dtype),
        "weight": normal(shape[-1], seed=3) + 1,
        "bias": normal(shape[-1], seed=4) if bias else None,
        "hidden_mask": mask,
    }


def sum_inputs(shape: tuple[int, ...], kind: str, layer: float | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {
        "residual": normal(*shape, seed=1, dtype=dtype),
        "branch": normal(*shape, seed=2, dtype=dtype),
        "hidden_mask": gates(kind, shape[-1]),
        "layer_gate": None if layer is None else torch.tensor(layer, device=DEVICE),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(3, 37), (2, 5, 576)])
def test_layer_norm_is_reference(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    assert_lawful("masked_layer_norm", inputs(shape, kind, dtype, bias=shape[0] == 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_mask_of_ones_is_no_mask_to_the_bit(dtype: torch.dtype) -> None:
    tensors = inputs((4, 72), "ones", dtype)
    masked = run(shear_kernels.masked_layer_norm, tensors, None, backend="triton")
    assert_same_bits(
        masked, run(shear_kernels.masked_layer_norm, tensors | {"hidden_mask": None}, None, backend="triton")
    )


def test_layer_norm_width_is_the_kept_width_and_closed_entries_may_hold_anything() -> None:
    tensors = inputs((5, 96), "zeros", torch.float32)
    x, weight, bias, mask = tensors.values()
    mask[::3] = 1
    x.copy_(normal(5, 96, seed=1)).masked_fill_(mask == 0, float("nan"))
    found = run(shear_kernels.masked_layer_norm, tensors, None, backend="triton")
    small = shear_kernels.masked_layer_norm(x[:, ::3], weight[::3], bias[::3], backend="triton")
    torch.testing.assert_close(found["output 0"][:, ::3], small)
    for result in found.values():
        assert torch.isfinite(result).all()
        assert not result[..., mask == 0].any()


def test_layer_norm_of_wide_rows() -> None:
    assert_lawful("masked_layer_norm", inputs((2, 5000), "soft", torch.bfloat16))
    tensors = inputs((2, 9000), "soft", torch.bfloat16)
    ours = run(shear_kernels.masked_layer_norm, tensors, None, backend="triton")
    assert_same_bits(ours, run(reference.masked_layer_norm, tensors, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", MASKS)
def test_sum_is_reference(kind: str, layer: float | None, dtype: torch.dtype) -> None:
    assert_lawful("gated_residual", sum_inputs((2, 9, 100), kind, layer, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_with_gates_of_one_is_without_to_the_bit(dtype: torch.dtype) -> None:
    tensors = sum_inputs((4, 72), "ones", 1.0, dtype)
    plain = tensors | {"hidden_mask": None, "layer_gate": None}
    ours, none = (run(shear_kernels.gated_residual, t, None, backend="triton") for t in (tensors, plain))
    assert_same_bits(ours, none)


def test_no_rows() -> None:
    for op, tensors in (
        (shear_kernels.masked_layer_norm, inputs((0, 16), "soft", torch.float32)),
        (shear_kernels.gated_residual, sum_inputs((0, 16), "soft", 0.5, torch.float32)),
    ):
        found = run(op, tensors, None, backend="triton")
        assert found.pop("output 0").shape == (0, 16)
        for name, value in found.items():
            assert not value.any(), name


def test_misfit_is_named() -> None:
    with pytest.raises(ValueError, match=r"bias \(7,\) does not fit hidden=8"):
        shear_kernels.masked_layer_norm(torch.ones(1, 8), torch.ones(8), torch.ones(7), backend="triton")
    with pytest.raises(ValueError, match=r"branch \(2, 8\)"):
        shear_kernels.gated_residual(torch.ones(1, 8), torch.ones(2, 8), torch.ones(8), backend="triton")
