"""What a run tells: a progress bar on the terminal, and in its folder one JSON line a step and snapshots of its gates.

``metrics.jsonl`` opens with a record {"run": {...}} of what is running where, and a resumed run adds another; all other
lines are steps. A run may be killed in the middle of a line, and readers may come while one is being written: a last
line that is not whole is not there.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shear_tron.train.viewers import Viewer, numbers

LOG, GATES, REFERENCES = "metrics.jsonl", "gates.jsonl", "reference_losses.json"


class Log:
    """The main rank's log; on other ranks it is silent. Lines after step ``first`` are dropped: undone."""

    def __init__(
        self, run: Path, first: int, steps: int, title: str, is_main: bool, viewers: Sequence[Viewer] = ()
    ) -> None:
        self.run = run if is_main else None
        self.viewers = viewers if is_main else ()
        if self.run:
            for file in (run / LOG, run / GATES):
                if file.exists():
                    kept = [json.dumps(line) + "\n" for line in read_lines(file) if _step(line) <= first]
                    file.write_text("".join(kept))
        self.bar = tqdm(
            total=steps,
            initial=first,
            desc=title,
            unit="step",
            disable=not is_main,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def write(self, values: Mapping[str, Any], file: str = LOG) -> None:
        if self.run:
            with (self.run / file).open("a") as out:
                out.write(json.dumps(_plain(values), allow_nan=False) + "\n")
            if file == LOG and "step" in values:
                for viewer in self.viewers:
                    viewer.write(values["step"], dict(numbers(values)))

    def advance(self, **shown: str) -> None:
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def say(self, text: str) -> None:
        if self.run:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        for viewer in self.viewers:
            viewer.close()


def _plain(value: Any) -> Any:
    """``value`` with null for every number that is not finite: JSON has no other word for it."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def read(run: Path) -> list[dict[str, Any]]:
    """The steps of a run's log."""
    return [line for line in read_lines(run / LOG) if "step" in line]


def headers(run: Path) -> list[dict[str, Any]]:
    """What ran where: a record for each time the run was started; none in logs of older versions."""
    return [line["run"] for line in read_lines(run / LOG) if "run" in line]


def read_gates(run: Path) -> list[dict[str, Any]]:
    """Snapshots of the gates (``shear_tron.pruning.snapshot``), each with its ``step``; [] where none were pruned."""
    return read_lines(run / GATES)


def read_references(run: Path) -> dict[str, float]:
    """The reference loss of each domain; {} where the run has none."""
    file = run / REFERENCES
    return dict(json.loads(file.read_text())) if file.exists() else {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of ``file``, [] where there is no file. ValueError where one that is not the last is damaged."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or delete the line") from None


def _step(line: dict[str, Any]) -> int:
    return int(line["run"]["from_step"] if "run" in line else line["step"])
