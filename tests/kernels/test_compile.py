"""torch.compile takes every op in one graph: by the definitions, on a CPU."""

import os

import pytest
import torch
from compiled_ops import assert_compiles


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(),
    reason="kernels run here, and test_compile_laws.py compiles them",
)
def test_every_op_compiles_in_one_graph() -> None:
    assert_compiles("aot_eager")
