"""What a rank asks of its own process before it joins the others."""

import ctypes
import faulthandler
import sys

import torch

# Of mallopt (malloc.h of glibc).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def prepare(device: torch.device) -> None:
    """Say where Python was should native code end the process, and on a CPU keep the memory of freed tensors."""
    if sys.__stderr__:
        faulthandler.enable(sys.__stderr__)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let malloc keep large blocks that are freed, as the caching allocator of CUDA does.

    By default glibc returns whatever is larger than 32 MB to the kernel at once, and every step begins by having each
    of its pages cleared again: a fifth of a step of the README's demo. Elsewhere than on glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
