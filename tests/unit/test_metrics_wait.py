"""Progress: a bar on a terminal, timed lines in a file; waits count for no step."""

import io
import sys
import time
from pathlib import Path

import pytest

from shear_tron import progress
from shear_tron.train.metrics import Log

LINE = {
    "loss": 2.5, "tokens_per_second": 90.0, "mfu": 0.41, "tflops_per_rank": 400.0, "peak_memory": 70e9,
    "weights": {"wiki": 0.25, "book": 0.75}, "kept": {"hidden": 0.9, "ffn": 0.5},
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(folder: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Log]:
    """What three steps with a wait of a second between them say."""
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    log = Log(folder, 0, 3, "pruning", True)
    for step in (1, 2, 3):
        time.sleep(0.05)
        log.tell({**LINE, "step": step} | ({"held_out": {"wiki": 3.0, "book": 2.0}} if step == 2 else {}), 1)
        with log.wait(f"losses at step {step}", 4, "windows") as waiting:
            time.sleep(0.4)
            waiting.update(4)
    log.close()
    assert isinstance(sys.stderr, io.StringIO)
    return sys.stderr.getvalue(), log


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_waits_slow_no_step(tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, log = run(tmp_path, terminal, monkeypatch)
    assert 0.15 < log.bar.format_dict["elapsed"] < 0.6  # of 1.35 seconds


def test_a_file_has_plain_lines_with_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = run(tmp_path, False, monkeypatch)
    assert "\r" not in said
    assert "\x1b" not in said
    lines = said.splitlines()
    assert lines[0].startswith("pruning: 0/3 [00:00<")
    assert "step 2: held-out loss wiki 3.000, book 2.000; mixture wiki 0.250, book 0.750; kept hidden 0.900" in said
    assert [line for line in lines if line.startswith("losses at step 2: 4/4 [00:00<00:00")]
    assert lines[-1].startswith("pruning: 3/3 [00:00<00:00")
    assert lines[-1].endswith("loss=2.500, tokens/s=90, MFU=41%, GB=70]")
    assert len(lines) == 9  # two of each bar, and one of losses


def test_a_long_wait_says_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.1)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar("saving step 7"), progress.bar("writing small", 4, "parameters") as written:
        for _ in range(4):
            time.sleep(0.06)
            written.update()
    said = sys.stderr.getvalue().splitlines()
    assert said[0] == said[-1] == "saving step 7: [00:00]"
    assert [line.split(" [")[0].rsplit(" ")[-1] for line in said[1:-1]] == ["0/4", "2/4", "4/4", "4/4"]


def test_a_terminal_keeps_the_bar_of_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = run(tmp_path, True, monkeypatch)
    assert "losses at step 2: 100%" in said
    assert "losses" not in said.rsplit("\r", 1)[-1]


def test_other_ranks_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, 0, 3, "pruning", False)
    with log.wait("losses", 4):
        log.tell({**LINE, "step": 1}, 1)
    log.close()
    assert capsys.readouterr().err == ""
