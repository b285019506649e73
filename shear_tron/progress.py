"""How far something is, for people: a bar on a terminal; in a log file plain lines, each with its time.

In a file a bar says a line when it begins, one at its end, and one every ``EVERY`` seconds between.
"""

import sys
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds


def bar(what: str, total: int | None = None, unit: str = "", silent: bool = False, **options: Any) -> "tqdm[Any]":
    """A bar to ``update`` and to close (a context manager), on stderr.

    total: in ``unit``; None where nobody can say how much is left. silent: for all ranks but one. options: tqdm's.
    """
    if sys.stderr.isatty():
        shape: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "file": sys.stderr}
        if total is None:
            shape["bar_format"] = "{desc} ..."
    else:
        counted, left = (" {n_fmt}/{total_fmt}", "<{remaining}, {rate_fmt}{postfix}") if total else ("", "")
        shape = {"leave": True, "position": 0, "mininterval": EVERY, "miniters": 1, "file": _Lines(sys.stderr)}
        shape["bar_format"] = f"{{desc}}:{counted} [{{elapsed}}{left}]"
    return tqdm(desc=what, total=total, unit=unit, disable=silent, **(shape | options))


class _Lines:
    """What tqdm draws over the line before it is a line of its own here."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, text: str) -> None:
        for line in text.replace("\r", "\n").splitlines():
            if line.strip():
                self.file.write(" ".join(line.split()) + "\n")

    def flush(self) -> None:
        self.file.flush()
