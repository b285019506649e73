"""The configurations that the ops can choose, for compilation ahead of time.

Block sizes come from the functions the ops themselves call. Shapes enter a compiled kernel only through them, through
compile-time constants and through divisibility by 16, which real shapes have.
"""

from dataclasses import dataclass
from typing import Any

import triton

from shear_kernels import attention, attention_backward, attention_forward, gather, norm, rotary, swiglu

FLOATS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
WIDE_POINTERS = {"mask", "gate", "layer", "weight", "cos", "sin", "inverse_rms", "log_sum", "delta"}
NUMBERS = {"eps", "scale", "scale_log2"}


@dataclass(frozen=True)
class Case:
    """One kernel with compile-time constants: ``name`` says which op configuration chooses it."""

    kernel: str
    name: str
    function: Any
    modules: tuple[str, ...]  # whose source the kernel is made of
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int


def _case(
    function: Any, name: str, dtype: str, constants: dict[str, Any], absent: set[str], warps: int, stages: int = 3
) -> Case:
    """Types by name: masks, weights, statistics and partial sums are float32, edges int32, other pointers ``dtype``."""
    pointers = _POINTERS[function.__name__]
    signature = {}
    for argument in function.arg_names:
        if argument in constants or argument in absent:
            signature[argument] = "constexpr"
        elif argument in NUMBERS:
            signature[argument] = "fp32"
        elif argument in ("starts", "ends"):
            signature[argument] = "*i32"
        elif argument.endswith("_partial") or (argument in pointers and argument in WIDE_POINTERS):
            signature[argument] = "*fp32"
        else:
            signature[argument] = FLOATS[dtype] if argument in pointers else "i32"
    modules: tuple[str, ...] = ("shear_kernels.precision", function.__module__)
    if function.__module__ == "shear_kernels.attention_backward":
        modules += ("shear_kernels.attention_forward",)
    return Case(
        function.__name__, f"{name} {dtype}", function, modules, signature,
        constants | dict.fromkeys(sorted(absent)), warps, stages,
    )  # fmt: skip


_POINTERS = {
    "masked_swiglu_forward": {"gate", "up", "mask", "out"},
    "masked_swiglu_backward": {"gate", "up", "mask", "dout", "dgate", "dup"},
    "add_rms_norm_forward": {"residual", "branch", "weight", "mask", "layer", "stream", "normed", "inverse_rms"},
    "add_rms_norm_backward": {
        "stream",
        "branch",
        "weight",
        "mask",
        "layer",
        "inverse_rms",
        "dnormed",
        "dstream",
        "dresidual",
        "dbranch",
    },
    "rope_kernel": {"q", "k", "cos", "sin", "q_out", "k_out"},
    "attention_forward": {"q", "k", "v", "gate", "out", "log_sum"},
    "attention_delta": {"out", "dout", "gate", "delta"},
    "attention_keys_backward": {"q", "k", "v", "gate", "dout", "log_sum", "delta", "dk", "dv"},
    "attention_queries_backward": {"q", "k", "v", "gate", "dout", "log_sum", "delta", "dq"},
}


def _swiglu(dtype: str, masked: bool) -> list[Case]:
    absent = set() if masked else {"mask"}
    name = "masked" if masked else "no mask"
    forward = {"HAS_MASK": masked, "ROWS": swiglu.FORWARD_ROWS, "GROUPS": swiglu.GROUPS}
    backward = {
        "HAS_MASK": masked,
        "ROWS": swiglu.BACKWARD_ROWS,
        "STEPS": swiglu.BACKWARD_STEPS,
        "GROUPS": swiglu.GROUPS,
    }
    return [
        _case(swiglu.masked_swiglu_forward, name, dtype, forward, absent, swiglu.WARPS),
        _case(
            swiglu.masked_swiglu_backward, name, dtype, backward, absent | (set() if masked else {"dmask_partial"}),
            swiglu.WARPS,
        ),
    ]  # fmt: skip


def _norm(dtype: str, hidden: int, fused: bool) -> list[Case]:
    block, forward_warps, backward_warps = norm.block_and_warps(hidden)
    flags = {"HAS_BRANCH": fused, "HAS_MASK": True, "HAS_LAYER": fused, "BLOCK": block}
    forward_absent = set() if fused else {"branch", "layer"}
    backward_absent = set() if fused else {"branch", "layer", "dstream", "dbranch", "dmask_partial", "dlayer_partial"}
    reload = {"RELOAD": block > 4096}
    name = f"{'add + norm' if fused else 'norm'} hidden<={block}"
    return [
        _case(norm.add_rms_norm_forward, name, dtype, flags, forward_absent, forward_warps),
        _case(norm.add_rms_norm_backward, name, dtype, flags | reload, backward_absent, backward_warps),
    ]


def _rope(dtype: str, heads: int, kv_heads: int, head_dim: int) -> Case:
    block_heads, half, warps = rotary.block_and_warps(heads, head_dim)
    constants = {
        "BACKWARD": False,
        "HALF": head_dim // 2,
        "BLOCK_HALF": half,
        "BLOCK_HEADS": block_heads,
        "BLOCK_KV_HEADS": triton.next_power_of_2(kv_heads),
    }
    return _case(rotary.rope_kernel, f"heads={heads}/{kv_heads} dim={head_dim}", dtype, constants, set(), warps)


def _attention(arch: int, dtype: str, head_dim: int, documents: bool = False) -> list[Case]:
    name = f"dim={head_dim}{' documents' if documents else ''}"
    absent = set() if documents else {"starts", "ends"}
    found = []
    for kernel, function in (
        ("forward", attention_forward.attention_forward),
        ("keys", attention_backward.attention_keys_backward),
        ("queries", attention_backward.attention_queries_backward),
    ):
        size = attention.blocks(kernel, head_dim, dtype != "fp32", arch, documents)
        constants = {
            "CAUSAL": True,
            "HAS_GATE": True,
            "HAS_DOCUMENTS": documents,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_M": size.m,
            "BLOCK_N": size.n,
        }
        found.append(_case(function, name, dtype, constants, absent, size.warps, size.stages))
    return found


def _delta(dtype: str, head_dim: int) -> Case:
    constants = {
        "HAS_GATE": True,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": attention.DELTA_ROWS,
    }
    return _case(attention_backward.attention_delta, f"dim={head_dim} gated", dtype, constants, set(), 4)


def _select(axes: str, weight: str, part: str) -> list[Case]:
    """Contiguous weights. axes: "rows", "columns" or "rows, columns"."""
    name = f"{axes} {weight} to"
    absent = set() if "rows" in axes else {"rows", "row_position"}
    absent |= set() if "columns" in axes else {"columns", "column_position"}
    gathered = {"weight": FLOATS[weight], "out": FLOATS[part], "rows": "*i64", "columns": "*i64"}
    scattered = {"dout": FLOATS[part], "dweight": FLOATS[weight], "row_position": "*i32", "column_position": "*i32"}
    found = []
    for function, pointers in ((gather.select_gather, gathered), (gather.select_scatter, scattered)):
        none = absent & pointers.keys()
        constants = {"column_stride": 1, "ROWS": gather.ROWS, "COLUMNS": gather.COLUMNS} | dict.fromkeys(sorted(none))
        types = {x: "constexpr" if x in constants else pointers.get(x, "i32") for x in function.arg_names}
        modules = ("shear_kernels.precision", "shear_kernels.gather")
        found.append(
            Case(function.__name__, f"{name} {part}", function, modules, types, constants, gather.WARPS, stages=3)
        )
    return found


def cases(arch: int) -> list[Case]:
    """Every block configuration that can be chosen on ``arch``, with the flags of a pruning step: masks, layer gate,
    causal. fp16 chooses as bf16 does; without mask or gate a kernel holds less."""
    found = [*_swiglu("bf16", True), *_swiglu("bf16", False)]
    for block in (256, 512, 1024, 2048, 4096, norm.WIDEST):
        found += _norm("bf16", block, fused=True)
    found += _norm("bf16", 4096, fused=False)
    for heads, kv_heads, head_dim in ((9, 3, 64), (16, 16, 128), (32, 8, 128), (64, 8, 128)):
        found.append(_rope("bf16", heads, kv_heads, head_dim))
    for head_dim in (32, 64, 96, 128):
        found += _attention(arch, "bf16", head_dim)
    found += _attention(arch, "bf16", 128, documents=True)
    found += _attention(arch, "fp32", 64) + _attention(arch, "fp32", 128)
    found.append(_delta("bf16", 128))
    for weight, part in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")):
        for axes in ("rows, columns", "rows", "columns"):
            found += _select(axes, weight, part)
    return found
