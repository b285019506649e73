"""What the benchmark measures: shapes, and for each op its inputs, its rivals and its least work."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args
from unittest.mock import patch

import shear_kernels
import torch
import torch.nn.functional as F
from shear_kernels import reference, roofline
from shear_kernels.dense_attention import AttentionBackend, can_serve
from torch import Tensor

Tensors = Mapping[str, Tensor]
Rival = Callable[..., Any]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its ops see."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


MODELS = (
    ModelShape("LLaMA-2-7B", 4096, 32, 32, 128, 11008),
    ModelShape("Llama-3-8B", 4096, 32, 8, 128, 14336),
    ModelShape("1.3B-target", 2048, 16, 16, 128, 5504),
)
TOKENS = 16384  # a microbatch: 4 x 4096 or 2 x 8192


@dataclass(frozen=True)
class Problem:
    """One op at one shape: ``inputs`` makes its tensors, ``definition`` is its meaning, ``rivals`` compute it."""

    op: str
    model: str
    sequence: int
    closed: float  # share of heads or columns whose gate is 0
    inputs: Callable[[str, torch.dtype], Tensors]
    definition: Rival
    rivals: Mapping[str, Rival]
    work: tuple[roofline.Work, roofline.Work]


def gates(units: int, closed: float, device: str) -> Tensor:
    """Scattered, as hard-concrete gates close: ``closed`` of them exactly 0, the others between 0.5 and 1."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(0))
    mask = torch.linspace(0.5, 1, units)
    mask[order[: round(closed * units)]] = 0
    return mask.to(device)


def _normal(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def attention(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    batch = max(1, tokens // sequence)

    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        return {
            "q": _normal(batch, sequence, m.heads, m.head_dim, device=device, dtype=dtype),
            "k": _normal(batch, sequence, m.kv_heads, m.head_dim, device=device, dtype=dtype),
            "v": _normal(batch, sequence, m.kv_heads, m.head_dim, device=device, dtype=dtype),
            "head_mask": gates(m.heads, closed, device),
        }

    def backend(name: Any) -> Rival:
        return lambda **t: shear_kernels.masked_attention(**t, backend=name)

    rivals: dict[str, Rival] = {"kernel": backend("triton")}
    dense = [b for b in get_args(AttentionBackend) if b not in ("triton", "reference")]
    for name in (b for b in dense if can_serve(b, torch.bfloat16, m.head_dim, edges=False)):
        rivals[f"{name} + multiply"] = backend(name)
        rivals[f"{name}, gate folded into o"] = _without_gate(name)
    rivals["kernel, no gate"] = _without_gate("triton")
    rivals["kernel, descriptors"] = _with_descriptors
    rivals["torch.compile"] = torch.compile(reference.masked_attention)
    work = roofline.masked_attention(batch, sequence, m.heads, m.kv_heads, m.head_dim, True, 1 - closed)
    return Problem("masked_attention", m.name, sequence, closed, inputs, reference.masked_attention, rivals, work)


def _without_gate(name: Any) -> Rival:
    return lambda q, k, v, head_mask: shear_kernels.masked_attention(q, k, v, backend=name)


def _with_descriptors(**tensors: Tensor) -> Tensor:
    """The forward's keys and values by tensor-copy descriptors, where the device has them."""
    from shear_kernels import attention as kernels  # which imports triton

    with patch.object(kernels, "DESCRIPTORS", True):
        return shear_kernels.masked_attention(**tensors, backend="triton")


def swiglu(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        gate, up = (_normal(tokens, m.ffn, device=device, dtype=dtype) for _ in range(2))
        return {"gate": gate, "up": up, "mask": gates(m.ffn, closed, device)}

    rivals: dict[str, Rival] = {
        "kernel": lambda **t: shear_kernels.masked_swiglu(**t, backend="triton"),
        "unfused": lambda gate, up, mask: F.silu(gate) * up * mask.to(gate.dtype),
        "torch.compile": torch.compile(lambda gate, up, mask: F.silu(gate) * up * mask.to(gate.dtype)),
    }
    if find_spec("liger_kernel"):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        rivals["liger + multiply"] = lambda gate, up, mask: LigerSiLUMulFunction.apply(gate, up) * mask.to(gate.dtype)
    work = roofline.masked_swiglu(tokens, m.ffn, 1 - closed)
    return Problem("masked_swiglu", m.name, sequence, closed, inputs, reference.masked_swiglu, rivals, work)


def gelu(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        return {"x": _normal(tokens, m.ffn, device=device, dtype=dtype), "mask": gates(m.ffn, closed, device)}

    rivals: dict[str, Rival] = {
        "kernel": lambda **t: shear_kernels.masked_gelu(**t, backend="triton"),
        "unfused": lambda x, mask: F.gelu(x) * mask.to(x.dtype),
        "torch.compile": torch.compile(lambda x, mask: F.gelu(x) * mask.to(x.dtype)),
    }
    work = roofline.masked_gelu(tokens, m.ffn, 1 - closed)
    return Problem("masked_gelu", m.name, sequence, closed, inputs, reference.masked_gelu, rivals, work)


def norm(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        mask = gates(m.hidden, closed, device)
        x = _normal(tokens, m.hidden, device=device, dtype=dtype) * (mask != 0)
        return {"x": x, "weight": torch.ones(m.hidden, device=device), "hidden_mask": mask}

    rivals: dict[str, Rival] = {
        "kernel": lambda **t: shear_kernels.masked_rms_norm(**t, backend="triton"),
        "unfused": reference.masked_rms_norm,
        "torch.compile": torch.compile(reference.masked_rms_norm),
    }
    if find_spec("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        rivals["liger, dense width"] = lambda x, weight, hidden_mask: LigerRMSNormFunction.apply(
            x, weight * hidden_mask, 1e-5
        )
    work = roofline.masked_rms_norm(tokens, m.hidden)
    return Problem("masked_rms_norm", m.name, sequence, closed, inputs, reference.masked_rms_norm, rivals, work)


def add_norm(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        mask = gates(m.hidden, closed, device)
        return {
            "residual": _normal(tokens, m.hidden, device=device, dtype=dtype) * (mask != 0),
            "branch": _normal(tokens, m.hidden, device=device, dtype=dtype),
            "weight": torch.ones(m.hidden, device=device),
            "hidden_mask": mask,
            "layer_gate": torch.tensor(0.7, device=device),
        }

    rivals: dict[str, Rival] = {
        "kernel": lambda **t: shear_kernels.add_rms_norm(**t, backend="triton"),
        "unfused": reference.add_rms_norm,
        "torch.compile": torch.compile(reference.add_rms_norm),
    }
    work = roofline.add_rms_norm(tokens, m.hidden)
    return Problem("add_rms_norm", m.name, sequence, closed, inputs, reference.add_rms_norm, rivals, work)


def layer_norm(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        mask = gates(m.hidden, closed, device)
        vectors = {"weight": torch.ones(m.hidden, device=device), "bias": torch.zeros(m.hidden, device=device)}
        return (
            {"x": _normal(tokens, m.hidden, device=device, dtype=dtype) * (mask != 0)} | vectors | {"hidden_mask": mask}
        )

    rivals: dict[str, Rival] = {
        "kernel": lambda **t: shear_kernels.masked_layer_norm(**t, backend="triton"),
        "unfused": reference.masked_layer_norm,
        "torch.compile": torch.compile(reference.masked_layer_norm),
    }
    work = roofline.masked_rms_norm(tokens, m.hidden)  # the same bytes but for two vectors
    return Problem("masked_layer_norm", m.name, sequence, closed, inputs, reference.masked_layer_norm, rivals, work)


def residual(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        tensors = {n: _normal(tokens, m.hidden, device=device, dtype=dtype) for n in ("residual", "branch")}
        return tensors | {
            "hidden_mask": gates(m.hidden, closed, device),
            "layer_gate": torch.tensor(0.7, device=device),
        }

    rivals: dict[str, Rival] = {
        "kernel": lambda **t: shear_kernels.gated_residual(**t, backend="triton"),
        "unfused": reference.gated_residual,
        "torch.compile": torch.compile(reference.gated_residual),
    }
    work = roofline.gated_residual(tokens, m.hidden)
    return Problem("gated_residual", m.name, sequence, closed, inputs, reference.gated_residual, rivals, work)


def rotary(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    batch = max(1, tokens // sequence)
    angle = torch.arange(sequence)[:, None] / 1e4 ** (torch.arange(m.head_dim // 2) / (m.head_dim // 2))

    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        return {
            "q": _normal(batch, sequence, m.heads, m.head_dim, device=device, dtype=dtype),
            "k": _normal(batch, sequence, m.kv_heads, m.head_dim, device=device, dtype=dtype),
        }

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    compiled = torch.compile(reference.rope)
    rivals: dict[str, Rival] = {
        "kernel": lambda q, k: shear_kernels.rope(q, k, cos, sin, backend="triton"),
        "unfused": lambda q, k: reference.rope(q, k, cos, sin),
        "torch.compile": lambda q, k: compiled(q, k, cos, sin),
    }
    work = roofline.rope(batch * sequence, m.heads, m.kv_heads, m.head_dim)
    return Problem("rope", m.name, sequence, closed, inputs, rivals["unfused"], rivals, work)


def _select(op: str, rows: int, columns: int, m: ModelShape, sequence: int, closed: float) -> Problem:
    """The cut of a float32 weight to bfloat16, as many of both axes closed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept_rows, kept_columns = (gates(size, closed, device).nonzero().flatten() for size in (rows, columns))

    def inputs(device: str, dtype: torch.dtype) -> Tensors:
        return {"weight": _normal(rows, columns, device=device, dtype=torch.float32)}

    def advanced_indexing(weight: Tensor) -> Tensor:
        return weight[kept_rows[:, None], kept_columns].to(torch.bfloat16)

    def twice(weight: Tensor) -> Tensor:
        return weight.index_select(0, kept_rows).index_select(1, kept_columns).to(torch.bfloat16)

    def definition(weight: Tensor) -> Tensor:
        return reference.select(weight, kept_rows, kept_columns, torch.bfloat16)

    rivals: dict[str, Rival] = {
        "kernel": lambda weight: shear_kernels.select(
            weight, kept_rows, kept_columns, torch.bfloat16, backend="triton"
        ),
        "advanced indexing": advanced_indexing,
        "index_select twice": twice,
        "torch.compile": torch.compile(advanced_indexing),
    }
    work = roofline.select(rows, columns, len(kept_rows), len(kept_columns))
    return Problem(op, m.name, sequence, closed, inputs, definition, rivals, work)


def select_query(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    return _select("select_query", m.heads * m.head_dim, m.hidden, m, sequence, closed)


def select_down(m: ModelShape, sequence: int, closed: float, tokens: int) -> Problem:
    return _select("select_down", m.hidden, m.ffn, m, sequence, closed)


Make = Callable[[ModelShape, int, float, int], Problem]
GRID: tuple[tuple[Make, tuple[int, ...], tuple[float, ...]], ...] = (
    (attention, (4096, 8192), (0.0, 0.25, 0.5, 0.75)),
    (swiglu, (4096,), (0.0, 0.25, 0.5, 0.75)),
    (norm, (4096,), (0.0, 0.25, 0.5, 0.75)),
    (add_norm, (4096,), (0.0, 0.25, 0.5, 0.75)),
    (gelu, (4096,), (0.0, 0.5)),
    (layer_norm, (4096,), (0.0, 0.5)),
    (residual, (4096,), (0.0,)),
    (rotary, (4096,), (0.0,)),
    (select_query, (4096,), (0.5,)),
    (select_down, (4096,), (0.5,)),
)
"""Maker, sequences, closed shares. Only attention depends on the sequence length; only gated ops on what is closed."""


def problems(tokens: int = TOKENS) -> Iterator[tuple[Problem, Problem]]:
    """(a row of the benchmark, the same op on 1,000 tokens: an odd length, small enough for float64)."""
    for make, sequences, shares in GRID:
        for model in MODELS:
            for sequence in sequences:
                for closed in shares:
                    yield make(model, sequence, closed, tokens), make(model, 1000, closed, 1000)
