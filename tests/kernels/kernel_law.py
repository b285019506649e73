"""A kernel is right when its error against float64 is at most twice that of plain PyTorch in the same precision."""

from collections.abc import Mapping
from typing import Any

import shear_kernels
import torch
from shear_kernels import reference
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "ones", "soft", "zeros"]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gates(kind: str, units: int, seed: int = 7) -> Tensor | None:
    """None, all ones, all zeros, or soft: a third exactly 0, a third exactly 1, the others between."""
    if kind == "none":
        return None
    if kind in ("ones", "zeros"):
        return torch.full((units,), float(kind == "ones"), device=DEVICE)
    draw = torch.rand(units, generator=torch.Generator().manual_seed(seed))
    return ((draw - 1 / 3) * 3).clamp(0, 1).to(DEVICE)


def run(op: Any, tensors: Mapping[str, Tensor | None], dtype: torch.dtype | None, **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of ``op`` by name; ``dtype`` converts all inputs first."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for name, t in tensors.items()
    }
    outputs = op(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [normal(*o.shape, seed=90 + i).to(o.dtype) for i, o in enumerate(outputs)]
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(outputs, list(given.values()), upstream)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {f"d({name})": g for name, g in zip(given, gradients, strict=True)}


def assert_lawful(name: str, tensors: Mapping[str, Tensor | None], **options: Any) -> dict[str, Tensor]:
    """Kernel against reference for all outputs and gradients. Returns the kernel's results.

    The gradient of a gate that is exactly 0 must be exactly 0. The floor of 2^-21 of the largest value is four float32
    roundings, for results that plain PyTorch happens to hit exactly. Gradients of fewer than 16 gates are left to tests
    that pool several draws: a handful of plain PyTorch's errors says nothing of their size.
    """
    ours = run(getattr(shear_kernels, name), tensors, None, backend="triton", **options)
    plain = run(getattr(reference, name), tensors, None, **options)
    exact = run(getattr(reference, name), tensors, torch.float64, **options)
    for key, truth in exact.items():
        mine, theirs = ours[key], plain[key]
        assert mine.dtype == theirs.dtype, f"{key}: {mine.dtype} instead of {theirs.dtype}"
        assert mine.shape == theirs.shape, f"{key}: {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
        if key in ("d(mask)", "d(head_mask)", "d(hidden_mask)", "d(layer_gate)"):
            gate = tensors[key[2:-1]]
            assert gate is not None
            assert not mine[gate == 0].any(), f"{key}: not 0 where the gate is 0"
            mine, theirs, truth = mine[gate != 0], theirs[gate != 0], truth[gate != 0]
            if truth.numel() < 16:
                assert torch.isfinite(mine).all(), key
                continue
        if truth.numel():
            error, allowed = (mine - truth).abs().max(), 2 * (theirs - truth).abs().max() + truth.abs().max() / 2**21
            assert error <= allowed, f"{key}: error {error:.3g} exceeds {allowed:.3g}, twice plain PyTorch's"
    return ours


def assert_same_bits(results: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    for key in results.keys() & others.keys():
        assert torch.equal(results[key], others[key]), f"{key} differs by {(results[key] - others[key]).abs().max()}"
