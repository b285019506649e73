"""A copy of a run elsewhere: at any URL that fsspec knows (s3://, gs://, file://), laid out as the run's folder is.

A checkpoint is there when its ``progress.json`` is, which is sent last and taken away first.
"""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.atomic import atomic
from shear_tron.reading import in_one_line


class Remote:
    """The copy at ``url``. Whatever its file system raises in a method is for the caller to catch.

    Raises ValueError where fsspec does not know such a URL, or lacks the package for it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            system, root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each file system has errors of its own
            raise ValueError(f"checkpoint.upload={url} cannot be used ({in_one_line(error)})") from None
        self.system: Any = system
        self.root = str(root).rstrip("/")

    def is_folder(self, folder: Path) -> bool:
        """Whether the copy would be ``folder`` itself."""
        return isinstance(self.system, LocalFileSystem) and Path(self.root).resolve() == folder.resolve()

    def steps(self) -> list[int]:
        """Of the whole checkpoints, the newest last."""
        folder = f"{self.root}/{sharded.FOLDER}"
        self.system.invalidate_cache()
        if not self.system.isdir(folder):
            return []
        names = {PurePosixPath(path).name for path in self.system.ls(folder, detail=False)}
        found = [Path(name) for name in sorted(names) if sharded.is_name(name)]
        return [sharded.step_of(each) for each in found if self.system.exists(f"{folder}/{each}/{sharded.PROGRESS}")]

    def begin(self, step: int) -> None:
        """Make room for a checkpoint; one of that step that was there before is gone."""
        if self.system.exists(self._place(step)):
            self._remove(step)
        self.system.makedirs(self._place(step), exist_ok=True)

    def send(self, files: Iterable[Path], step: int | None = None) -> None:
        """Copy local files into the place of a step, or of the run."""
        place = self.root if step is None else self._place(step)
        for file in files:
            self.system.put_file(str(file), f"{place}/{file.name}")

    def finish(self, checkpoint: Path, keep: int, keep_every: int) -> None:
        """Call a checkpoint whole whose other files were sent, with the run's logs, and remove older ones."""
        run = checkpoint.parent.parent
        self.send(file for file in sorted(run.iterdir()) if file.is_file() and not file.name.startswith("."))
        step = sharded.step_of(checkpoint)
        place = f"{self._place(step)}/{sharded.PROGRESS}"
        self.system.put_file(str(checkpoint / sharded.PROGRESS), f"{place}.part")
        self.system.mv(f"{place}.part", place)
        for old in sharded.outdated(self.steps(), step, keep, keep_every):
            self._remove(old)

    def fetch(self, step: int, run: Path) -> None:
        """Copy a checkpoint and the run's logs into ``run``. ValueError where it is not what was written."""
        for path in self.system.ls(self.root, detail=False):
            if self.system.isfile(path):
                draft = run / f".{PurePosixPath(path).name}.{os.getpid()}"
                self.system.get_file(path, str(draft))
                os.replace(draft, run / PurePosixPath(path).name)
        with atomic(sharded.path(run, step)) as partial:
            partial.mkdir()
            for path in self.system.ls(self._place(step), detail=False):
                self.system.get_file(path, str(partial / PurePosixPath(path).name))
            sharded.verify(partial)

    def _place(self, step: int) -> str:
        return f"{self.root}/{sharded.path(Path(), step).as_posix()}"

    def _remove(self, step: int) -> None:
        place = self._place(step)
        if self.system.exists(f"{place}/{sharded.PROGRESS}"):
            self.system.rm_file(f"{place}/{sharded.PROGRESS}")
        self.system.rm(place, recursive=True)


def fetch_latest(remote: Remote, run: Path) -> int | None:
    """Bring the newest checkpoint of a run's copy, with its logs, into a folder that has none. Returns its step.

    Several processes may ask at once: one fetches, the others wait and find it there. ValueError in one line.
    """
    if sharded.latest(run) is not None:
        return None
    try:
        steps = remote.steps()
        if not steps:
            return None
        run.mkdir(parents=True, exist_ok=True)
        with open(run / ".fetch", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if sharded.latest(run) is not None:
                return None
            remote.fetch(steps[-1], run)
        return steps[-1]
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"{remote.url} cannot be fetched from: {in_one_line(error)}") from None
