"""The configurations that the ops can choose, for compilation ahead of time.

Block sizes come from the functions the ops themselves call. Shapes enter a compiled kernel only through them, through
compile-time constants and through divisibility by 16, which real shapes have.
"""

from dataclasses import dataclass
from typing import Any

import triton

from shear_kernels import (
    activation,
    attention,
    attention_backward,
    attention_forward,
    exponentials,
    gather,
    layer_norm,
    norm,
    norm_kernels,
    residual,
    rotary,
)

FLOATS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
WIDE_POINTERS = {"mask", "layer", "weight", "bias", "cos", "sin", "inverse_rms", "mean", "inverse_deviation"}
WIDE_POINTERS |= {"gate", "log_sum", "delta", "logits", "top", "total"}
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
    function: Any,
    name: str,
    dtype: str,
    constants: dict[str, Any],
    absent: set[str],
    warps: int,
    stages: int = 3,
    narrow: frozenset[str] | set[str] = frozenset(),
) -> Case:
    """Types by name: masks, weights, statistics and partial sums are float32 but for those ``narrow``, edges int32,
    other pointers ``dtype``."""
    pointers = _POINTERS[function.__name__].split()
    signature = {}
    for argument in function.arg_names:
        if argument in constants or argument in absent:
            signature[argument] = "constexpr"
        elif argument in NUMBERS:
            signature[argument] = "fp32"
        elif argument in ("starts", "ends", "label"):
            signature[argument] = "*i64" if argument == "label" else "*i32"
        elif argument.endswith("_partial") or (argument in pointers and argument in WIDE_POINTERS - narrow):
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
    "activation_forward": "gate up mask out",
    "activation_backward": "gate up mask dout dgate dup",
    "add_rms_norm_forward": "residual branch weight mask layer stream normed inverse_rms",
    "add_rms_norm_backward": "stream branch weight mask layer inverse_rms dnormed dstream dresidual dbranch",
    "layer_norm_forward": "x weight bias mask out mean inverse_deviation",
    "layer_norm_backward": "x weight mask mean inverse_deviation dout dx",
    "gated_residual_forward": "residual branch mask layer out",
    "gated_residual_backward": "branch mask layer dout dbranch",
    "exponentials_kernel": "logits label top total terms",
    "rope_kernel": "q k cos sin q_out k_out",
    "attention_forward": "q k v gate out log_sum",
    "attention_delta": "out dout gate delta",
    "attention_keys_backward": "q k v gate dout log_sum delta dk dv",
    "attention_queries_backward": "q k v gate dout log_sum delta dq",
}


def _activation(kind: str, dtype: str, masked: bool) -> list[Case]:
    has_up = kind == "silu"
    absent = (set() if masked else {"mask", "dmask_partial"}) | (set() if has_up else {"up", "dup"})
    name = f"{kind} {'masked' if masked else 'no mask'}"
    found = []
    for function, steps in (
        (activation.activation_forward, {"ROWS": activation.FORWARD_ROWS}),
        (activation.activation_backward, {"ROWS": activation.BACKWARD_ROWS, "STEPS": activation.BACKWARD_STEPS}),
    ):
        flags = {"KIND": kind, "HAS_UP": has_up, "HAS_MASK": masked, "GROUPS": activation.GROUPS} | steps
        here = absent & set(function.arg_names)
        gates = {"gate"}  # the name of an input here, of 16 bits
        found.append(_case(function, name, dtype, flags, here, activation.WARPS, narrow=gates))
    return found


def _norm(dtype: str, hidden: int, fused: bool, weight: str = "fp32") -> list[Case]:
    block, forward_warps, backward_warps = norm.block_and_warps(hidden)
    flags = {"HAS_BRANCH": fused, "HAS_MASK": True, "HAS_LAYER": fused, "BLOCK": block}
    forward_absent = set() if fused else {"branch", "layer"}
    backward_absent = set() if fused else {"branch", "layer", "dstream", "dbranch", "dmask_partial", "dlayer_partial"}
    reload = {"RELOAD": block > 4096}
    name = f"{'add + norm' if fused else 'norm'} hidden<={block}{'' if weight == 'fp32' else f' weight {weight}'}"
    narrow = set() if weight == "fp32" else {"weight"}
    forward, backward = norm_kernels.add_rms_norm_forward, norm_kernels.add_rms_norm_backward
    return [
        _case(forward, name, dtype, flags, forward_absent, forward_warps, narrow=narrow),
        _case(backward, name, dtype, flags | reload, backward_absent, backward_warps, narrow=narrow),
    ]


def _rows(dtype: str, hidden: int) -> list[Case]:
    """Layer norm with a bias, and the gated residual."""
    block, forward_warps, backward_warps = norm.block_and_warps(hidden)
    name, norm_flags = f"hidden<={block}", {"HAS_BIAS": True, "HAS_MASK": True, "BLOCK": block}
    flags = {"HAS_MASK": True, "HAS_LAYER": True, "BLOCK": block}
    return [
        _case(layer_norm.layer_norm_forward, name, dtype, norm_flags, set(), forward_warps),
        _case(layer_norm.layer_norm_backward, name, dtype, norm_flags, set(), backward_warps),
        _case(residual.gated_residual_forward, name, dtype, flags, set(), forward_warps),
        _case(residual.gated_residual_backward, name, dtype, flags, set(), backward_warps),
    ]


def _rope(dtype: str, heads: int, kv_heads: int, head_dim: int, turns: int) -> Case:
    block_heads, half, warps = rotary.block_and_warps(heads, turns)
    constants = {
        "BACKWARD": False,
        "HALF": turns // 2,
        "HEAD_DIM": head_dim,
        "BLOCK_REST": triton.next_power_of_2(max(1, head_dim - turns)),
        "BLOCK_HALF": half,
        "BLOCK_HEADS": block_heads,
        "BLOCK_KV_HEADS": triton.next_power_of_2(kv_heads),
    }
    return _case(rotary.rope_kernel, f"heads={heads}/{kv_heads} dim={turns}/{head_dim}", dtype, constants, set(), warps)


def _attention(arch: int, dtype: str, head_dim: int, edges: bool = False, descriptors: bool = False) -> list[Case]:
    """With ``descriptors`` the forward alone, which knows them."""
    name = f"dim={head_dim}{' edges' if edges else ''}{' descriptors' if descriptors else ''}"
    absent = set() if edges else {"starts", "ends"}
    found = []
    for kernel, function in (
        ("forward", attention_forward.attention_forward),
        ("keys", attention_backward.attention_keys_backward),
        ("queries", attention_backward.attention_queries_backward),
    ):
        size = attention.blocks(kernel, head_dim, dtype != "fp32", arch, edges)
        constants = {
            "CAUSAL": True,
            "HAS_GATE": True,
            "HAS_EDGES": edges,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_M": size.m,
            "BLOCK_N": size.n,
        }
        if kernel == "forward":
            constants["DESCRIPTORS"] = descriptors
        found.append(_case(function, name, dtype, constants, absent, size.warps, size.stages))
    return found[:1] if descriptors else found


def _delta(dtype: str, head_dim: int) -> Case:
    constants = {
        "HAS_GATE": True,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": attention.DELTA_ROWS,
    }
    return _case(attention_backward.attention_delta, f"dim={head_dim} gated", dtype, constants, set(), 4)


def _exponentials(dtype: str) -> Case:
    constants = {"KEEP": True, "BLOCK": exponentials.BLOCK}
    function = exponentials.exponentials_kernel
    return _case(function, "fp32 to", dtype, constants, set(), exponentials.WARPS)


def _select(axes: str, weight: str, part: str, scaled: bool = False) -> list[Case]:
    """Contiguous weights. axes: "rows", "columns" or "rows, columns"."""
    name = f"{axes} {weight} to"
    absent = set() if "rows" in axes else {"rows", "row_position"}
    absent |= set() if "columns" in axes else {"columns", "column_position"}
    absent |= set() if scaled else {"row_scale", "column_scale"}
    scales = {"row_scale": "*fp32", "column_scale": "*fp32"}
    indices = {"rows": "*i64", "columns": "*i64"}
    types_of = [
        (gather.select_gather, {"weight": FLOATS[weight], "out": FLOATS[part]} | indices),
        (
            gather.select_scatter,
            {"dout": FLOATS[part], "dweight": FLOATS[weight], "row_position": "*i32", "column_position": "*i32"},
        ),
    ]
    if scaled:
        name = f"scaled {name}"
        both = {"part": FLOATS[weight], "dout": FLOATS[part], "row_partial": "*fp32", "column_partial": "*fp32"}
        types_of.append((gather.select_scale_gradients, both))
    found = []
    for function, given in types_of:
        pointers = given | scales
        none = absent & pointers.keys()
        constants = {"column_stride": 1, "ROWS": gather.ROWS, "COLUMNS": gather.COLUMNS} | dict.fromkeys(sorted(none))
        if function is gather.select_scale_gradients:
            constants |= {"dout_column_stride": 1, "STEPS": gather.SCALE_STEPS}
        types = {x: "constexpr" if x in constants else pointers.get(x, "i32") for x in function.arg_names}
        modules = ("shear_kernels.precision", "shear_kernels.gather")
        found.append(
            Case(function.__name__, f"{name} {part}", function, modules, types, constants, gather.WARPS, stages=3)
        )
    return found


def cases(arch: int) -> list[Case]:
    """Every block configuration that can be chosen on ``arch``, with the flags of a pruning step: masks, layer gate,
    causal. fp16 chooses as bf16 does; without mask or gate a kernel holds less."""
    found = [c for kind in ("silu", "gelu", "gelu_tanh") for c in _activation(kind, "bf16", True)]
    found += _activation("silu", "bf16", False)
    for block in (256, 512, 1024, 2048, 4096, norm.WIDEST):
        found += _norm("bf16", block, fused=True)
    found += _norm("bf16", 4096, fused=False) + _norm("bf16", 4096, fused=False, weight="bf16")
    for block in (2048, 4096, norm.WIDEST):
        found += _rows("bf16", block)
    for heads, kv_heads, head_dim, turns in (
        (9, 3, 64, 64), (8, 8, 64, 16), (16, 16, 128, 128), (32, 8, 128, 128), (64, 8, 128, 128)
    ):  # fmt: skip
        found.append(_rope("bf16", heads, kv_heads, head_dim, turns))
    for head_dim in (32, 64, 96, 128):
        found += _attention(arch, "bf16", head_dim)
    found += _attention(arch, "bf16", 128, edges=True)
    if arch >= 90:
        for head_dim in (64, 128):
            found += _attention(arch, "bf16", head_dim, descriptors=True)
        found += _attention(arch, "bf16", 128, edges=True, descriptors=True)
    found += _attention(arch, "fp32", 64) + _attention(arch, "fp32", 128)
    found += [_delta("bf16", 128), _exponentials("bf16")]
    for weight, part in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")):
        for axes in ("rows, columns", "rows", "columns"):
            found += _select(axes, weight, part)
    found += _select("rows, columns", "fp32", "bf16", scaled=True)
    return found
