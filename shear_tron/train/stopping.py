"""Stopping a run before its end: a signal is remembered, and at the end of the step all ranks save and leave."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, Self

# Slurm's warning (``--signal=USR1@120``) ends a run as SIGTERM does. Of two signals the larger number wins.
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
IMPATIENT = 1.0  # seconds after which a second Ctrl-C counts; launchers send the same one twice


class Stopped(Exception):  # noqa: N818 - no error
    """A run was asked to stop and did, on all ranks together; everything is saved."""

    def __init__(self, number: int, saved: str) -> None:
        self.name = signal.Signals(number).name
        self.status = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        super().__init__(f"stopped by {self.name}; {saved}")


class Signals:
    """While this context lasts, a signal to stop does so in good order. A second Ctrl-C interrupts at once.

    Before ``remember`` there is nothing to lose, and a signal raises Stopped where it comes. Afterwards it is only
    remembered, in ``asked``, until the context ends. Only the main thread of a process may set handlers: in any other,
    signals do what they did before.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal's number; 0: none came
        self._remember = self._tell = False
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def remember(self, tell: bool = False) -> None:
        """From here on a step ends before the run does. tell: answer Ctrl-C with that, on stderr."""
        self._remember, self._tell = True, tell

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._remember:
            self._remember = True
            raise Stopped(number, "before the first step, so there is nothing to save")
        if number == self.asked == signal.SIGINT and time.monotonic() > self._at + IMPATIENT:
            raise KeyboardInterrupt
        if self._tell and number == signal.SIGINT and not self.asked:
            text = "\nshear-tron train: ending this step, then saving; Ctrl-C again leaves at once\n"
            with suppress(OSError):  # who reads it, such as `tee`, may have ended by the same Ctrl-C
                os.write(2, text.encode())  # sys.stderr may be in the middle of a line
        self.asked, self._at = max(number, self.asked), time.monotonic()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
