"""Saving a running training, at once or in the background, and keeping no more than asked.

torch.distributed.checkpoint plans who writes what. Every rank brings its own file to the disk (``Storage``), the main
rank writes ``progress.json`` with the sha256 of all of them, and only then does the checkpoint get its name. A crash at
any moment leaves the checkpoints before it as they were.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.remote import Remote
from shear_tron.checkpoint.storage import Storage
from shear_tron.files import sync, write_atomically
from shear_tron.parallel.agree import AgreedError, first_text, gather_texts, highest, require_all
from shear_tron.reading import in_one_line

PARTIAL = ".partial"

log = getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run. Made and used by all ranks together, by one run at a time.

    Args:
        run: the run's folder.
        keep: the newest so many stay on disk.
        keep_every: and those of steps that are multiples of this, for ever; 0: none.
        minutes: after which ``is_late`` asks for the next one; 0: never.
        background: write in a thread, from a copy of the tensors in the host's memory. Training waits for the copy
            only, and for a save before that is not done yet.
        upload: URL of a copy of the run that gets every checkpoint, and keeps as many; None: none. Where sending fails,
            the run says so and goes on: the next checkpoint is sent too.
    """

    def __init__(
        self, run: Path, keep: int, keep_every: int = 0, minutes: float = 0.0, background: bool = False,
        upload: str | None = None,
    ) -> None:  # fmt: skip
        self.run, self.keep, self.keep_every, self.minutes = run, keep, keep_every, minutes
        self.background = background
        self.remote = None if upload is None else Remote(upload)
        self.main = dist.get_rank() == 0
        self._saved: tuple[int, float] = (-1, time.monotonic())  # step, when
        self._copies: dict[str, Tensor] = {}  # in the host's memory, for the thread
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if background else None
        self._pending: Future[None] | None = None
        # A thread needs a group of its own: its collectives must not mix with those of training.
        self._group = dist.new_group(backend="gloo")
        if self.main and (run / sharded.FOLDER).is_dir():
            for left in (run / sharded.FOLDER).iterdir():
                if left.suffix == PARTIAL and sharded.is_name(left.stem):
                    shutil.rmtree(left, ignore_errors=True)  # of a process that was killed while it saved

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, in the background ones that are being written aside; None without."""
        return sharded.latest(self.run)

    def newest(self) -> Path | None:
        """The newest checkpoint, one that is being written included: it is waited for. The same on all ranks."""
        self.wait()
        found = self.latest()
        (step,) = highest(-1 if found is None else sharded.step_of(found))
        return None if step < 0 else sharded.path(self.run, step)

    def last_good(self) -> str:
        """A sentence about it. One that is being written is waited for: when it is whole, older ones go."""
        with suppress(AgreedError):
            self.wait()
        found = self.latest()
        return "No checkpoint was written" if found is None else f"The last good checkpoint is {found}"

    def is_late(self) -> bool:
        """Whether it is time for the next one, by the main rank's clock; elsewhere never."""
        return self.main and bool(self.minutes) and time.monotonic() - self._saved[1] > self.minutes * 60

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Save a step; a second time, nothing happens.

        tensors: DTensors (each rank writes its part) and plain tensors (equal on all ranks that have them).
        state: everything else, alike on all ranks, as JSON takes it. Raises AgreedError where a value is not finite,
        the folder's name is taken, or this save or the one in the background before it failed.
        """
        if self._saved[0] == step:
            return
        self.wait()
        sharded.require_finite(tensors, f"step {step} is not saved")
        self._saved = (step, time.monotonic())
        # Made now: the thread must see neither tensors nor numbers of later steps.
        text = json.dumps(state)
        parts = sharded.parts(tensors)
        if self._thread is None:
            self._write(step, tensors, parts, text)
        else:
            self._pending = self._thread.submit(self._write, step, tensors, self._copied(parts), text)

    def _copied(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the host's memory, in the same place every time: fresh memory costs more than the copying."""
        for name, part in parts.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self._copies[name].copy_(part)
        return self._copies

    def wait(self) -> None:
        """Until the save in the background is done. Raises what went wrong in it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish, and stop the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown(wait=True)

    def _write(self, step: int, tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor], state: str) -> None:
        """tensors: whose sizes and places are looked at; parts: whose values are written."""
        final = sharded.path(self.run, step)
        partial = final.with_suffix(PARTIAL)
        self._on_main(lambda: self._begin(final, partial), f"step {step} is not saved")
        storage = Storage(partial, parts)
        try:
            save_distributed(dict(tensors), storage_writer=storage, process_group=self._group)
        except CheckpointException as error:  # no Exception; all ranks get it
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise AgreedError(f"step {step} is not saved: {reasons}") from None
        files: dict[str, Any] = {}
        for text in gather_texts(json.dumps(storage.files), self._group):
            files |= json.loads(text)
        content = sharded.sealed({"step": step, "files": files, "state": json.loads(state)})
        self._on_main(lambda: self._finish(final, partial, content), f"step {step} is not saved")
        if self.remote is not None:
            self._upload(self.remote, final, [final / name for name in storage.files])

    def _upload(self, remote: Remote, checkpoint: Path, mine: list[Path]) -> None:
        """Send a checkpoint, each rank its own files. Only a whole one is called so there."""
        step = sharded.step_of(checkpoint)
        parts: list[Callable[[], None] | None] = [
            (lambda: remote.begin(step)) if self.main else None,
            lambda: remote.send(mine, step),
            (lambda: remote.finish(checkpoint, self.keep, self.keep_every)) if self.main else None,
        ]
        for part in parts:
            problem = None
            try:
                if part is not None:
                    part()
            except Exception as error:  # each file system has errors of its own
                problem = f"rank {dist.get_rank()}: {in_one_line(error)}"
            found = first_text(problem, self._group)
            if found is not None:
                if self.main:
                    log.warning("step %d was not sent to %s: %s; it is in %s", step, remote.url, found, checkpoint)
                return

    def _on_main(self, work: Any, consequence: str) -> None:
        """Do ``work`` on the main rank, and wait for it on all. AgreedError where the file system refuses."""
        problem = None
        if self.main:
            try:
                work()
            except (OSError, ValueError) as error:
                problem = f"{consequence}: {error}"
        require_all(problem, self._group)

    def _begin(self, final: Path, partial: Path) -> None:
        if final.exists() or final.is_symlink():
            raise ValueError(f"{final} is in the way, and is no whole checkpoint; move it")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _finish(self, final: Path, partial: Path, content: str) -> None:
        """Give a checkpoint its name, and only then remove older ones."""
        write_atomically(partial / sharded.PROGRESS, content)
        os.rename(partial, final)
        sync(final.parent)
        there = [sharded.step_of(each) for each in sharded.checkpoints(self.run)]
        for old in sharded.outdated(there, sharded.step_of(final), self.keep, self.keep_every):
            going = sharded.path(self.run, old).with_suffix(PARTIAL)  # gone at once; a part of it is no checkpoint
            os.rename(sharded.path(self.run, old), going)
            shutil.rmtree(going, ignore_errors=True)
