"""Outputs appear whole or not at all."""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(output: str | Path) -> Iterator[Path]:
    """A path to write a file or folder to; what is there at the end appears at ``output``, and after an error nothing.

    What an earlier writer of ``output`` left when it was killed is removed. Raises ValueError where ``output`` is there
    already and is no empty folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; choose another name or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f".{glob.escape(output.name)}.*.partial"):
        shutil.rmtree(left)
    room = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    room.mkdir()
    try:
        yield room / output.name
        if output.is_dir():
            output.rmdir()
        os.rename(room / output.name, output)
    finally:
        shutil.rmtree(room)
