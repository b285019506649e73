"""What a run tells: a progress bar on the terminal and one JSON line a step in the run's folder."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOG = "metrics.jsonl"


class Log:
    """The main rank's log; on other ranks it is silent. Lines after step ``first`` are dropped: undone."""

    def __init__(self, run: Path, first: int, steps: int, title: str, is_main: bool) -> None:
        self.file = run / LOG if is_main else None
        if self.file and self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _step(line) <= first]
            self.file.write_text("".join(line + "\n" for line in lines))
        self.bar = tqdm(
            total=steps,
            initial=first,
            desc=title,
            unit="step",
            disable=not is_main,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def write(self, values: Mapping[str, Any]) -> None:
        if self.file:
            with self.file.open("a") as out:
                out.write(json.dumps(values) + "\n")

    def advance(self, **shown: str) -> None:
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def say(self, text: str) -> None:
        if self.file:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


def _step(line: str) -> int:
    """The step of a log line; a line cut off by a kill belongs to no step that counts."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return sys.maxsize
