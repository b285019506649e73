# mypy: disable-error-code="no-untyped-call"
"""Kernel launches as torch ops, ``torch.ops.shear_kernels.*``, so that torch sees them as it sees its own.

``torch.compile`` then holds one node for a launch instead of breaking its graph, and selective checkpointing can save
what one returns. Derivatives stay in a ``torch.autograd.Function`` around the ops, which torch.compile reads too: that
costs the host less time than ``torch.library.register_autograd``, and unlike ``triton_op`` an op of this kind also runs
in Triton's interpreter, where it is proved.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

LIBRARY = Library("shear_kernels", "DEF")

Run = Callable[..., Any]


def torch_op(fake: Run) -> Callable[[Run], Run]:
    """Makes a function that launches kernels the op of its name. ``fake`` takes the same arguments and gives what the
    op gives, in sizes, dtypes and strides only: fresh tensors, never an argument. For what is absent: ``nothing``."""

    def register(run: Run) -> Run:
        name = run.__name__
        LIBRARY.define(name + infer_schema(run, mutates_args=()))
        for device in ("CPU", "CUDA"):  # a CPU's tensors: in the interpreter
            LIBRARY.impl(name, run, device)
        register_fake(f"shear_kernels::{name}", fake, lib=LIBRARY)
        op: Run = getattr(torch.ops.shear_kernels, name).default
        return op

    return register


def nothing(like: Tensor) -> Tensor:
    """What an op gives in the place of a result that was not asked for: ops cannot give None."""
    return like.new_empty(0)
