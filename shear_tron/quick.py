"""Imports of torch for commands that answer in a second or two."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Nobody looks for garbage in all of torch, neither while it is imported nor when Python ends: half a second."""
    atexit.register(gc.freeze)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
