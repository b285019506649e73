"""Masked RMS norm, alone and fused with the gated residual addition: kernel = reference."""

import pytest
import shear_kernels
import torch
from kernel_law import DEVICE, DTYPES, MASKS, assert_lawful, assert_same_bits, gates, normal, run
from shear_kernels import reference
from torch import Tensor

LAYERS = [None, 0.0, 0.3, 1.0]


def stream(shape: tuple[int, ...], mask: Tensor | None, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """A residual stream, zero where the hidden mask is."""
    x = normal(*shape, seed=seed)
    return (x if mask is None else x * (mask != 0)).to(dtype)


def add_inputs(shape: tuple[int, ...], kind: str, layer: float | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
    mask = gates(kind, shape[-1])
    return {
        "residual": stream(shape, mask, dtype),
        "branch": normal(*shape, seed=2, dtype=dtype),
        "weight": normal(shape[-1], seed=3) + 1,
        "hidden_mask": mask,
        "layer_gate": None if layer is None else torch.tensor(layer, device=DEVICE),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(1, 8), (3, 37), (2, 5, 576)])
def test_norm_is_reference(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    mask = gates(kind, shape[-1])
    weight = (normal(shape[-1], seed=3) + 1).to(dtype)
    assert_lawful("masked_rms_norm", {"x": stream(shape, mask, dtype), "weight": weight, "hidden_mask": mask})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", MASKS)
def test_add_norm_is_reference(kind: str, layer: float | None, dtype: torch.dtype) -> None:
    assert_lawful("add_rms_norm", add_inputs((2, 9, 100), kind, layer, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "soft"])
def test_layer_gate_gradient_is_reference(kind: str, dtype: torch.dtype) -> None:
    """One number a draw, so the law is on the root mean square error of 12 draws."""
    errors: dict[str, list[Tensor]] = {"kernel": [], "plain": []}
    for draw in range(12):
        tensors = add_inputs((3, 20), kind, 0.3, dtype) | {"branch": normal(3, 20, seed=100 + draw, dtype=dtype)}
        truth = run(reference.add_rms_norm, tensors, torch.float64)["d(layer_gate)"]
        kernel = run(shear_kernels.add_rms_norm, tensors, None, backend="triton")["d(layer_gate)"]
        errors["kernel"].append(kernel - truth)
        errors["plain"].append(run(reference.add_rms_norm, tensors, None)["d(layer_gate)"] - truth)
    kernel_error, plain_error = (torch.stack(e).square().mean().sqrt() for e in errors.values())
    assert 0 < kernel_error <= 2 * plain_error


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_one_are_no_gates_to_the_bit(dtype: torch.dtype) -> None:
    open_gates = add_inputs((4, 72), "ones", 1.0, dtype)
    no_gates = open_gates | {"hidden_mask": None, "layer_gate": None}
    assert_same_bits(
        run(shear_kernels.add_rms_norm, open_gates, None, backend="triton"),
        run(shear_kernels.add_rms_norm, no_gates, None, backend="triton"),
    )


def test_width_is_the_kept_width() -> None:
    """The masked norm equals the norm of the model that lacks the closed entries."""
    mask = torch.zeros(96, device=DEVICE)
    mask[::3] = 1
    x, weight = stream((5, 96), mask, torch.float32), normal(96, seed=3)
    small = shear_kernels.masked_rms_norm(x[:, ::3], weight[::3], backend="triton")
    torch.testing.assert_close(shear_kernels.masked_rms_norm(x, weight, mask, backend="triton")[:, ::3], small)


def test_no_rows() -> None:
    empty = torch.empty(0, 16, device=DEVICE)
    found = run(shear_kernels.masked_rms_norm, {"x": empty, "weight": torch.ones(16, device=DEVICE)}, None)
    assert found["output 0"].shape == (0, 16)


def test_wide_rows() -> None:
    assert_lawful("add_rms_norm", add_inputs((2, 5000), "soft", 0.3, torch.bfloat16))


def test_rows_too_wide_for_a_program_run_the_definition() -> None:
    tensors = add_inputs((2, 9000), "soft", 0.3, torch.bfloat16)
    ours = run(shear_kernels.add_rms_norm, tensors, None, backend="triton")
    assert_same_bits(ours, run(reference.add_rms_norm, tensors, None))


def test_misfit_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight \(7,\)"):
        shear_kernels.masked_rms_norm(torch.ones(1, 8), torch.ones(7), backend="triton")
