"""What a run tells: a progress bar on the terminal, and in its folder one JSON line a step and snapshots of its gates.

``metrics.jsonl`` opens with a record {"run": {...}} of what is running where, and a resumed run adds another; a run
that goes back because its loss jumped adds {"rewind": {...}}; {"start": {...}} says what the model was before the first
step; all other lines are steps. A run may be killed in the middle of a line, and readers may come while one is being
written: a last line that is not whole is not there.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shear_tron.files import write_atomically
from shear_tron.progress import bar
from shear_tron.reading import in_one_line, read_json, read_text
from shear_tron.train import lines
from shear_tron.train.viewers import Viewer, numbers

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from tqdm import tqdm

LARGEST = 4 << 30  # bytes of a log: a million lines of a step
LOG, GATES, REFERENCES = "metrics.jsonl", "gates.jsonl", "reference_losses.json"


class Log:
    """The main rank's log; on other ranks it is silent. Lines after step ``first`` are dropped: undone."""

    def __init__(
        self, run: Path, first: int, steps: int, title: str, is_main: bool, viewers: Sequence[Viewer] = ()
    ) -> None:
        self.run = run if is_main else None
        self.viewers = viewers if is_main else ()
        self._drop_after(first)
        self.bar = bar(title, steps, "step", not is_main, initial=first, leave=True)

    def _drop_after(self, step: int, going_back: bool = False) -> None:
        """going_back: records of having gone back to that very step before stay."""
        for file in (self.run / LOG, self.run / GATES) if self.run else ():
            if file.exists():
                kept = [line for line in _readable(file) if _step(line) <= step + (going_back and "rewind" in line)]
                write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept))

    def go_back(self, at: int, to: int, samples: Sequence[int], loss: float) -> None:
        """From a step whose loss jumped: lines after step ``to`` are dropped, and a record says why."""
        self._drop_after(to, going_back=True)
        self.write({"rewind": {"at": at, "to": to, "samples": list(samples), "loss": loss}})
        self.say(f"step {at}: loss {loss:.3f} jumped; back to step {to}, samples {samples[0]} to {samples[1]} left out")
        self.bar.update(to - self.bar.n)

    def write(self, values: Mapping[str, Any], file: str = LOG) -> None:
        if self.run:
            with (self.run / file).open("a") as out:
                out.write(json.dumps(_plain(values), allow_nan=False) + "\n")
            line = values.get("start", values)
            if file == LOG and "step" in line:
                for viewer in self.viewers:
                    viewer.write(line["step"], dict(numbers(line)))

    def tell_start(self, line: Mapping[str, Any]) -> None:
        """What the model was before the first step."""
        self.write({"start": line})
        self._say_losses(line)

    def tell(self, line: Mapping[str, Any], every: int) -> None:
        """A step, in the file if its number is a multiple of ``every`` or there is more to it than a step."""
        step = line["step"]
        if step % every == 0 or "held_out" in line or "skipped" in line:
            self.write(line)
        if "skipped" in line:
            self.say(f"step {step} skipped: {line['skipped']}")
        if "held_out" in line:
            self._say_losses(line)
        if not step:
            return
        shown = {"loss": f"{line['loss']:.3f}", "tokens/s": f"{line['tokens_per_second']:.0f}"}
        if line["mfu"] is None:
            shown["TFLOP/s"] = f"{line['tflops_per_rank']:.3g}"
        else:
            shown["MFU"] = f"{line['mfu']:.0%}"
        shown["GB"] = f"{line['peak_memory'] / 1e9:.3g}"
        if "expected_sparsity" in line:
            shown["sparsity"] = f"{line['expected_sparsity']:.2f}/{line['target_sparsity']:.2f}"
            shown["time"] = f"{line['seconds_to_dense']:.2f} of dense"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def _say_losses(self, line: Mapping[str, Any]) -> None:
        self.say(f"step {line['step']}: held-out loss {listed(line['held_out'])}{_state(line)}")

    def say(self, text: str) -> None:
        if self.run:
            self.bar.write(text, file=sys.stderr)

    @contextmanager
    def wait(self, why: str, total: int | None = None, unit: str = "") -> Iterator["tqdm[Any]"]:
        """Say what is waited for, on a bar of its own that is yielded; the time it takes counts for no step."""
        began = time.time()
        with bar(why, total, unit, self.run is None) as waiting:
            yield waiting
        if self.run:
            passed = time.time() - began
            self.bar.start_t += passed
            self.bar.last_print_t += passed

    def close(self) -> None:
        self.bar.close()
        for viewer in self.viewers:
            viewer.close()


def listed(losses: Mapping[str, float]) -> str:
    """Numbers by name, such as losses by domain, for people."""
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())


def _state(line: Mapping[str, Any]) -> str:
    """Of the run, next to its losses: the mixture, and what is kept of every kind of unit."""
    told = {"mixture": line["weights"], "kept": line.get("kept", {})}
    return "".join(f"; {what} {listed(values)}" for what, values in told.items() if len(values) > 1)


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


def start(run: Path) -> dict[str, Any] | None:
    """What the model was before the first step: a line with its ``held_out`` losses; None in logs of older versions."""
    found = [line["start"] for line in read_lines(run / LOG) if "start" in line]
    return found[-1] if found else None  # one for each time that a run began without a checkpoint


def read_gates(run: Path) -> list[dict[str, Any]]:
    """Snapshots of the gates (``shear_tron.pruning.snapshot``), each with its ``step``; [] where none were pruned."""
    return read_lines(run / GATES, lines.SNAPSHOT)


def read_references(run: Path) -> dict[str, float]:
    """The reference loss of each domain; {} where the run has none. ValueError where the file is damaged."""
    file = run / REFERENCES
    if not file.exists():
        return {}
    try:
        return lines.REFERENCES.validate_python(read_json(file), strict=True)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({in_one_line(error)}); restore it, or delete it") from None


def read_lines(file: Path, kind: "TypeAdapter[Any]" = lines.LINE) -> list[dict[str, Any]]:
    """The whole lines of ``file``, [] where there is no file. ValueError where one that is not the last is damaged."""
    if not file.exists():
        return []
    text = read_text(file, LARGEST)
    whole = text[: text.rfind("\n") + 1].splitlines()
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(kind.validate_json(line, strict=True))
        except ValueError as error:
            reason = in_one_line(error)
            raise ValueError(f"{file} is damaged (line {number}: {reason}); restore it, or delete the line") from None
    return found


def _readable(file: Path) -> list[dict[str, Any]]:
    """The lines of ``file`` that are whole steps or headers: a damaged one must not keep a run from going on."""
    if not file.is_file():
        raise ValueError(f"{file} is no regular file; move it")
    found = []
    for text in file.read_bytes().splitlines():
        with suppress(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            line = json.loads(text)
            _step(line)
            found.append(line)
    return found


def _step(line: dict[str, Any]) -> int:
    """After which step a line was written; going back to a step comes before it is saved, and is undone with it."""
    if "rewind" in line:
        return int(line["rewind"]["to"]) + 1
    return int(line["run"]["from_step"] if "run" in line else line.get("start", line)["step"])
