"""Outputs appear whole or not at all."""

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shear_tron.files import sync


@contextmanager
def atomic(output: str | Path) -> Iterator[Path]:
    """A path to write a file or folder to; what is there at the end appears at ``output``, and after an error nothing.

    It is on the disk before it appears. What an earlier writer of ``output`` left when it was killed is removed; one
    that is still at it holds a lock. Raises ValueError where ``output`` is there already and is no empty folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; choose another name or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f".{glob.escape(output.name)}.*.partial"):
        with _locked(left) as dead:
            if dead:
                shutil.rmtree(left)
    room = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    room.mkdir()
    try:
        with _locked(room):
            yield room / output.name
            for path in [room / output.name, *(room / output.name).rglob("*")]:
                sync(path)
            if output.is_dir():
                output.rmdir()
            os.rename(room / output.name, output)
            sync(output.parent)
    finally:
        shutil.rmtree(room)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether ``folder`` is locked by this context now; a process that died has left no lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:  # another's; or a file system without locks, where nothing is removed
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)
