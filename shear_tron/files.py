"""Files that are whole or not there: written beside their place, on disk before they get their name."""

import hashlib
import os
from pathlib import Path


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replace ``file`` by ``content``: a reader, or a crash, sees the old content or the new, never a part."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
