"""An error that nobody foresaw, in one line."""

import tempfile
import traceback
from contextlib import suppress


def told(error: BaseException, debug: bool = False) -> str:
    """What it says, and a file that says where it came from. debug: so does ``--debug``."""
    lines = str(error).strip().splitlines() or [""]
    name = type(error).__name__
    where = "; --debug says where" if debug else ""
    with suppress(OSError):  # the disk may be what is full
        with tempfile.NamedTemporaryFile("w", prefix="shear-tron-", suffix=".txt", delete=False) as trace:
            trace.write("".join(traceback.format_exception(error)))
        where = f"; {trace.name} says where{', as does --debug' if debug else ''}"
    return f"{lines[0] or name}{f' ({name})' if lines[0] else ''}{where}"
