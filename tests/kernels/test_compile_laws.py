"""Kernels are torch ops: torch.compile takes them in one graph, and checkpointing can save what they return."""

from functools import partial
from typing import Any

import pytest
import shear_kernels
import torch
from compiled_ops import assert_compiles
from kernel_law import DEVICE, gates, normal
from shear_kernels import activation, attention, exponentials, gather, layer_norm, norm, residual, rotary
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Q, MASK, X, ROW = normal(1, 9, 4, 16, seed=1), gates("soft", 4), normal(5, 24, seed=2), gates("soft", 24)
KV, STATISTIC, ANGLE = normal(1, 9, 2, 16, seed=3), normal(5, seed=4), normal(9, 8, seed=5)
EDGES = torch.zeros(1, 9, dtype=torch.int32, device=DEVICE), torch.full((1, 9), 9, dtype=torch.int32, device=DEVICE)
SUMS, KEPT, LAYER = normal(1, 4, 9, seed=6), torch.tensor([0, 3], device=DEVICE), torch.tensor(0.5, device=DEVICE)
SIZE, FP32 = [5, 24], torch.float32
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (attention.attention, (Q, KV, KV, MASK, *EDGES, True)),
    (attention.attention, (Q, Q, Q, None, None, None, False)),
    (attention.attention_backward, (Q, KV, KV, MASK, *EDGES, Q, SUMS, Q, True)),
    (attention.attention_backward, (Q, KV, KV, None, None, None, Q, SUMS, Q, True)),
    (activation.activation, (X, X, ROW, "silu")),
    (activation.activation, (X, None, None, "gelu")),
    (activation.activation_gradients, (X, X, ROW, X, "silu")),
    (activation.activation_gradients, (X, None, None, X, "gelu_tanh")),
    (norm.rms_norm, (X, X[0], ROW, 1e-5)),
    (norm.residual_rms_norm, (X, X, X[0], ROW, LAYER, 1e-5)),
    (norm.rms_norm_gradients, (X, X, X[0], ROW, LAYER, STATISTIC, X, X, torch.bfloat16)),
    (norm.rms_norm_gradients, (X, None, X[0], None, None, STATISTIC, X, None, None)),
    (layer_norm.layer_norm, (X, X[0], X[1], ROW, 1e-5)),
    (layer_norm.layer_norm_gradients, (X, X[0], X[1], ROW, STATISTIC, STATISTIC, X)),
    (layer_norm.layer_norm_gradients, (X, X[0], None, None, STATISTIC, STATISTIC, X)),
    (residual.add_gated, (X, X, ROW, LAYER)),
    (residual.add_gated_gradients, (X, ROW, None, X)),
    (exponentials.exponentials, (X, torch.tensor([3, -1, 0, 23, 5], device=DEVICE), torch.bfloat16)),
    (exponentials.exponentials, (X, torch.tensor([3, -1, 0, 23, 5], device=DEVICE), None)),
    (rotary.rotate, (Q, KV, ANGLE, ANGLE, False)),
    (gather.gather, ([X], [KEPT], None, X[0, :2], None, torch.bfloat16)),
    (gather.gather, ([X, X[:3]], [KEPT, None], KEPT, None, None, FP32)),
    (gather.scatter, (X[:2], KEPT, None, None, X[0], SIZE, FP32)),
    (gather.scale_gradients, (X[:2], X[0, :2], X[0], X[2:4])),
]


@pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[f"{i} {op.name()}" for i, (op, _) in enumerate(CALLS)])
def test_fakes_and_schemas_are_of_the_op(op: Any, arguments: tuple[Any, ...]) -> None:
    """By torch's own check: sizes, dtypes and strides of the fake, no argument changed or returned."""
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_op_has_its_case() -> None:
    called = {op.name() for op, _ in CALLS}
    assert called == {f"shear_kernels::{name}" for name in dir(torch.ops.shear_kernels) if name in _registered()}


def _registered() -> set[str]:
    return {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("shear_kernels::")}


def test_every_op_compiles_in_one_graph() -> None:
    assert shear_kernels.fuses_masks(X)
    assert_compiles("aot_eager")


def test_selective_checkpointing_saves_attention() -> None:
    """The op runs once, though all around it runs again in the backward."""
    q = normal(1, 9, 4, 16, seed=1).requires_grad_()
    runs: list[str] = []

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            runs.append(str(func))
            return func(*args, **(kwargs or {}))

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is torch.ops.shear_kernels.attention.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q: torch.Tensor) -> torch.Tensor:
        return shear_kernels.masked_attention(q.sin(), q, q, backend="triton").sum()

    for saves, times in ((True, 1), (False, 2)):
        runs.clear()
        contexts = partial(create_selective_checkpoint_contexts, policy) if saves else None
        options = {"context_fn": contexts} if saves else {}
        with Counted():
            checkpoint(block, q, use_reentrant=False, **options).backward()
        assert runs.count("shear_kernels.attention.default") == times
        assert runs.count("aten.sin.default") == 2
