"""The prediction of a step's kernels: by hand where a hand can, and it names every part."""

import pytest
from shear_kernels import step_time
from shear_kernels.step_time import LLAMA_2_7B, SHEARED_1_3B


def test_products_of_a_step_are_six_flops_a_weight_and_token() -> None:
    parts = step_time.step_parts(16384, 4096, 24, SHEARED_1_3B, 32000)
    weights = 24 * (4 * 2048**2 + 3 * 2048 * 5504)
    forward, backward = parts["matrix products"]
    assert forward.flops + backward.flops == 6 * weights * 16384
    assert sum(work.flops for work in parts["head's products"]) == 6 * 2048 * 32000 * 16384
    assert "select and scatter" not in parts


def test_a_compact_step_reads_the_source_and_writes_its_gradient() -> None:
    forward, backward = step_time.layer_parts(4096, 4096, SHEARED_1_3B, LLAMA_2_7B)["select and scatter"]
    whole = 4 * 4096**2 + 3 * 4096 * 11008
    assert forward.bytes == pytest.approx(4 * whole / 2 + 2 * whole / 4, rel=1e-3)  # half of the rows, then the part
    assert backward.bytes == pytest.approx(4 * whole + 2 * whole / 4, rel=1e-3)


def test_time_is_the_longer_of_arithmetic_and_traffic() -> None:
    device = step_time.Reached("D", 1e12, (2e12, 4e12), 1e12, 2e12)
    work = step_time.Work(bytes=3e9, flops=8e9)
    assert step_time.milliseconds(device, {"x": (work, work)}) == {"x": (8.0, 8.0)}
    assert step_time.milliseconds(device, {"attention": (work, work)}) == {"attention": (4.0, 3.0)}


def test_command_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_time.main(["--rows", "4096"]) == 0
    printed = capsys.readouterr().out
    for part in (*step_time.step_parts(4096, 4096, 1, SHEARED_1_3B, 8, LLAMA_2_7B), "all"):
        assert f"\n{part} " in printed


def test_command_says_what_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    """By arithmetic: a closed microbatch of 16,384 tokens in 360 ms, half of the peak for a dense step."""
    step_time.main([])
    assert float(capsys.readouterr().out.splitlines()[-1].split()[-1]) <= 360
    step_time.main(["--dense"])
    assert float(capsys.readouterr().out.splitlines()[-1].split("%")[0]) >= 50
