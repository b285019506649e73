"""One rank of a run that meets a fault: it dies, or the disk is full, at a moment when it touches the disk.

Every write (half of it done), every fsync and every new name below the run's folder is a *point*. A rank counts the
points it passes, so a fault can be put in the middle of any file, again and again at the same place.
"""

import builtins
import errno
import io
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIE, DIE_ALL, FULL = "dies", "dies with all others", "finds the disk full"


@dataclass(frozen=True)
class Fault:
    """What happens at point number ``at`` among those whose description contains ``only``."""

    rank: int
    at: int
    what: str
    only: str = ""


class Disk:
    """The points that this process passes below ``folder``, told to ``told`` one a line, and its fault."""

    def __init__(self, folder: Path, rank: int, fault: Fault | None, shared: Path) -> None:
        self.folder, self.rank, self.shared = str(folder), rank, shared
        self.fault = fault if fault and fault.rank == rank else None
        self.full_may_come = fault is not None and fault.what == FULL
        self.seen, self.lock = 0, threading.Lock()
        self.told = open(shared / f"points-{rank}", "w")  # noqa: SIM115 - as long as the process
        self.open = io.open

    def watch(self) -> None:
        """From here on every way in which Python touches the disk passes by."""
        opened = self.open

        def open_(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            stream = opened(file, mode, *rest, **named)
            return Half(stream, self, str(file)) if set(mode) & set("wax+") and self.mine(file) else stream

        io.open = builtins.open = open_
        for module, name, place in (
            (os, "rename", 1), (os, "replace", 1), (os, "mkdir", 0), (os, "unlink", 0), (shutil, "rmtree", 0),
        ):  # fmt: skip
            setattr(module, name, self.passing(getattr(module, name), name, place))
        fsync = os.fsync

        def fsync_(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            name = os.readlink(f"/proc/self/fd/{number}")
            if self.mine(name):
                self.point(f"fsync of {called(name)}")
            fsync(descriptor)

        os.fsync = fsync_

    def passing(self, function: Callable[..., Any], name: str, place: int) -> Callable[..., Any]:
        def passes(*arguments: Any, **named: Any) -> Any:
            if self.mine(arguments[place]):
                self.point(f"{name} of {called(arguments[place])}")
            return function(*arguments, **named)

        return passes

    def mine(self, file: Any) -> bool:
        return isinstance(file, str | os.PathLike) and os.path.abspath(file).startswith(self.folder)

    def point(self, what: str, undo: Callable[[], None] = lambda: None) -> None:
        """Pass a point. Where a fault is due, it comes; ``undo`` makes what is to be seen of the half-done write."""
        with self.lock:
            due = self.fault is not None and self.fault.only in what and self.fault.what != FULL
            grows = what.startswith(("write", "mkdir"))
            due = due or (self.fault is not None and self.fault.what == FULL and grows and self.fault.only in what)
            if due:
                self.seen += 1
            self.told.write(what + "\n")
            self.told.flush()
            now = due and self.fault is not None and self.seen - 1 == self.fault.at
        if now and self.fault is not None and self.fault.what != FULL:
            undo()
            (self.shared / "killed").write_text(what)
            others = [int(file.name.removeprefix("pid-")) for file in self.shared.glob("pid-*")]
            for pid in others if self.fault.what == DIE_ALL else []:
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if now:
            (self.shared / "killed").write_text(what)
        if self.full_may_come and grows and (self.shared / "killed").exists():
            undo()
            raise OSError(errno.ENOSPC, "No space left on device", what)


def called(file: Any) -> str:
    """A file's name; of a draft, that of what it becomes."""
    return re.sub(r"^\.(.+)\.\d+$", r"\1", Path(file).name)


class Half:
    """A file being written, each write in two halves with a point between."""

    def __init__(self, stream: Any, disk: Disk, name: str) -> None:
        self._stream, self._disk, self._name = stream, disk, called(name)

    def write(self, data: Any) -> int:
        middle = len(data) // 2

        def half() -> None:
            self._stream.write(data[:middle])
            self._stream.flush()

        self._disk.point(f"write of {self._name}", half)
        return int(self._stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "Half":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)


def rank(
    number: int, world: int, port: int, folder: str, arguments: list[str], fault: Fault | None, shared: str
) -> None:
    """What torchrun starts: the command line, with its environment; what it says goes to a file of ``shared``."""
    place = Path(shared)
    (place / f"pid-{os.getpid()}").touch()
    said = os.open(place / f"said-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    import torch

    from shear_tron import cli

    torch.set_num_threads(1)
    disk = Disk(Path(folder), number, fault, place)
    disk.watch()
    status = cli.main(arguments)
    sys.stderr.flush()
    os._exit(status)  # no time for what an interpreter does at its end
