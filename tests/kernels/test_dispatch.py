"""Which implementation serves a call."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import shear_kernels
import torch
from shear_kernels import dense_attention, reference

WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
import shear_kernels, torch
x = torch.ones(2, 8)
assert shear_kernels.masked_swiglu(x, x).shape == (2, 8)
assert "triton" not in sys.modules
try:
    shear_kernels.masked_swiglu(x, x, backend="triton")
except ValueError as error:
    assert "needs triton" in str(error), error
else:
    raise AssertionError("served without triton")
"""


def child(code: str, **environment: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importable_and_usable_without_triton() -> None:
    child(WITHOUT_TRITON)


def test_reference_on_a_cpu_and_kernels_under_the_interpreter() -> None:
    code = """
import shear_kernels, sys, torch
x = torch.ones(2, 8)
shear_kernels.masked_swiglu(x, x)
assert ("shear_kernels.activation" in sys.modules) is {expected}
shear_kernels.masked_swiglu(x.double(), x.double())  # float64: the definition
assert shear_kernels.fuses_masks(x) is {expected} and not shear_kernels.fuses_masks(x.double())
"""
    child(code.format(expected=False))
    pytest.importorskip("triton")
    child(code.format(expected=True), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_float64_is_exact_everywhere() -> None:
    gate, up, mask = (torch.randn(4, 8, dtype=torch.float64) for _ in range(3))
    assert torch.equal(shear_kernels.masked_swiglu(gate, up, mask[0]), reference.masked_swiglu(gate, up, mask[0]))


def test_ops_have_the_definitions_signatures() -> None:
    import inspect

    names = "masked_attention masked_swiglu masked_gelu masked_rms_norm masked_layer_norm add_rms_norm gated_residual"
    names += " rope select"
    for name in names.split():
        ours, theirs = (
            list(inspect.signature(getattr(m, name)).parameters.values()) for m in (shear_kernels, reference)
        )
        assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs], name
        assert (ours[-1].name, ours[-1].default) == ("backend", None), name


@pytest.mark.parametrize("op", ["masked_swiglu", "masked_attention"])
def test_unknown_backend_is_named(op: str) -> None:
    x = torch.ones(1, 2, 1, 8)
    arguments = (x, x) if op == "masked_swiglu" else (x, x, x)
    with pytest.raises(ValueError, match="backend='cuda' is not one of"):
        getattr(shear_kernels, op)(*arguments, backend="cuda")


def test_dense_backend_then_gate_is_the_definition() -> None:
    q, mask = torch.randn(1, 6, 4, 8), torch.tensor([0.0, 1.0, 0.5, 0.2])
    ours = shear_kernels.masked_attention(q, q, q, mask, backend="sdpa")
    assert torch.equal(ours, reference.masked_attention(q, q, q, mask))
    with pytest.raises(ValueError, match="knows no document boundaries"):
        shear_kernels.masked_attention(q, q, q, cu_seqlens=torch.tensor([0, 6]), backend="sdpa_flash")


class Machine:
    """A CUDA device that is not there: its capability, its name, and the packages beside torch that are installed."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: tuple[int, int], *packages: str, name: str = "G") -> None:
        packages = ("triton", *packages)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        patch.setattr(torch.backends.cudnn, "is_available", lambda: "cudnn" in packages)
        patch.setattr(dense_attention, "find_spec", lambda name: name if name in packages else None)
        patch.setattr(dense_attention, "_have_varlen", lambda: "varlen" in packages)

    def chooses(
        self, gated: bool = False, edges: bool = False, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
    ) -> str:
        return dense_attention.choose(torch.device("cuda:0"), dtype, head_dim, gated, edges)


@pytest.mark.parametrize(
    ("capability", "packages", "dense", "edges"),
    [
        ((9, 0), ["cudnn", "flash_attn_interface", "varlen"], "sdpa_cudnn", "flash_attn_3"),
        ((9, 0), ["cudnn", "varlen"], "sdpa_cudnn", "varlen"),
        ((9, 0), ["flash_attn_interface"], "flash_attn_3", "flash_attn_3"),
        ((9, 0), ["varlen", "flash_attn"], "varlen", "varlen"),
        ((9, 0), [], "triton", "triton"),
        ((8, 0), ["cudnn", "flash_attn", "varlen"], "flash_attn", "flash_attn"),
        ((8, 0), ["cudnn"], "sdpa_flash", "triton"),
        ((10, 0), ["cudnn", "flash_attn", "varlen"], "triton", "triton"),
        ((7, 5), ["cudnn"], "triton", "triton"),
    ],
)
def test_a_capability_gets_the_first_backend_that_is_there(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], packages: list[str], dense: str, edges: str
) -> None:
    machine = Machine(monkeypatch, capability, *packages)
    assert machine.chooses() == dense
    assert machine.chooses(edges=True) == edges
    assert machine.chooses(gated=True) == machine.chooses(gated=True, edges=True) == "triton"  # skips closed heads


def test_calls_that_a_backend_cannot_take_go_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (9, 0), "cudnn", "varlen")
    assert machine.chooses(dtype=torch.float32) == "triton"  # the dense kernels have 16 bits
    assert machine.chooses(head_dim=256) == "varlen"  # cuDNN's backward ends at 128
    assert machine.chooses(head_dim=36) == "triton"
    assert machine.chooses(dtype=torch.float64) == "reference"
    assert machine.chooses(gated=True, head_dim=256) == "reference"


def test_the_choice_is_a_constant_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads packages and devices, which would break a graph."""
    machine, device = Machine(monkeypatch, (9, 0), "cudnn"), torch.device("cuda:0")

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * len(dense_attention.choose(device, torch.bfloat16, 128, False, False))

    x = torch.ones(3)
    assert torch.equal(torch.compile(scaled, fullgraph=True, backend="eager")(x), x * len(machine.chooses()))


def test_both_tables_may_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, (9, 0), "cudnn")
    monkeypatch.setitem(dense_attention.PREFERRED, (9, 0), ("triton",))
    assert machine.chooses() == "triton"
    monkeypatch.setitem(dense_attention.MEASURED, ("G", False), "sdpa_flash")
    assert machine.chooses() == "sdpa_flash"
    assert machine.chooses(edges=True) == "triton"  # it knows no documents
    monkeypatch.setitem(dense_attention.MEASURED, ("G", True), "flash_attn")
    assert machine.chooses(gated=True) == "triton"  # not installed


@pytest.mark.parametrize(
    ("backend", "package", "function", "arguments"),
    [
        ("flash_attn", "flash_attn", "flash_attn_func", {"causal": True, "window_size": (-1, -1)}),
        ("flash_attn", "flash_attn", "flash_attn_varlen_func", {"causal": True, "window_size": (2, 0)}),
        ("flash_attn_3", "flash_attn_interface", "flash_attn_varlen_func", {"causal": True, "window_size": (2, 0)}),
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", {"window_size": (2, 0), "enable_gqa": True}),
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", {"window_size": (-1, 0), "enable_gqa": True}),
    ],
)
def test_packages_are_called_as_they_ask(
    monkeypatch: pytest.MonkeyPatch, backend: Any, package: str, function: str, arguments: dict[str, Any]
) -> None:
    """By a stand-in that records the call and answers by the definition: two rows of six, three documents."""
    seen: list[Any] = []
    documents = torch.tensor([0, 2, 6, 12], dtype=torch.int32) if function != "flash_attn_func" else None
    window = 3 if arguments["window_size"][0] == 2 else None
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8)

    def stand_in(q: Any, k: Any, v: Any, *edges: Any, **options: Any) -> Any:
        seen.extend((edges, options))
        rows = [x.view(2, 6, *x.shape[-2:]) for x in (q, k, v)]
        return reference.masked_attention(*rows, cu_seqlens=documents, window=window).view(q.shape)

    monkeypatch.setattr(dense_attention, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{function: stand_in}))
    mask = torch.tensor([0.0, 1.0, 0.5, 0.2])
    ours = shear_kernels.masked_attention(q, k, k, mask, cu_seqlens=documents, window=window, backend=backend)
    torch.testing.assert_close(ours, reference.masked_attention(q, k, k, mask, cu_seqlens=documents, window=window))
    edges, options = seen
    assert options == arguments
    if documents is None:
        assert edges == ()
    else:
        assert edges[0].tolist() == edges[1].tolist() == sorted([0, 2, 6, 12, 0, 6, 12])
        assert edges[2:] == (6, 6)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_attention, "find_spec", lambda name: None)
    q = torch.ones(1, 2, 1, 8)
    with pytest.raises(ValueError, match="needs the package flash_attn_interface"):
        shear_kernels.masked_attention(q, q, q, backend="flash_attn_3")


def test_head_gates_fuse_where_the_chosen_attention_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shear_kernels.fuses_head_gates(torch.ones(2, 8), 8) is shear_kernels.fuses_masks(torch.ones(2, 8))
    Machine(monkeypatch, (9, 0), "cudnn")
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=torch.bfloat16)
    assert not shear_kernels.fuses_head_gates(on_gpu, 128)  # type: ignore[arg-type]
    assert shear_kernels.fuses_head_gates(on_gpu, 128, edges=True)  # type: ignore[arg-type]
