"""Waits count for no step: neither the rate on the bar nor the time to go knows them."""

import time
from pathlib import Path

import pytest

from shear_tron.train.metrics import Log


def test_a_wait_does_not_slow_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, 0, 4, "pruning", True)
    before = time.monotonic()
    with log.wait("losses of the source"):
        time.sleep(0.3)
    passed = time.monotonic() - before
    assert passed >= 0.3
    assert log.bar.format_dict["elapsed"] < 0.2
    log.close()
    assert "pruning (losses of the source)" in capsys.readouterr().err
    Log(tmp_path, 0, 4, "pruning", False).wait("nothing is said on other ranks")
