"""The benchmark's runner on a machine without a GPU, and its pictures."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))
import plot
import run
from shear_kernels import roofline


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a GPU")
def test_without_a_gpu_it_prints_the_rooflines_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.csv"
    assert run.main(["--op", "swiglu", "--results", str(results)]) == 0
    printed = capsys.readouterr().out
    assert "No CUDA device here: nothing was measured" in printed
    assert "masked_swiglu     Llama-3-8B" in printed
    assert "attention_keys_backward" in printed  # the compiled kernels
    assert not results.exists()


def test_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match="no row has op 'convolution'"):
        run.main(["--op", "convolution"])


def test_rows_become_pictures(tmp_path: Path) -> None:
    about = {"gpu": "G", "torch": "t", "triton": "t", "commit": "c", "date": "d"}
    rows = [
        run.Result("masked_swiglu", "M", 4096, closed, rival, way, 1.0 - closed / 2, 0.1, 0.0, 1.0, 0.5, 1.0, **about)
        for closed in (0.0, 0.5)
        for rival in ("kernel", "unfused")
        for way in ("forward", "backward")
    ]
    run.append(tmp_path / "results.csv", rows[:4])
    run.append(tmp_path / "results.csv", rows[4:])
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 9
    (picture,) = plot.draw(tmp_path / "results.csv", tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rooflines_of_known_shapes() -> None:
    """LLaMA-2-7B, one sequence of 4096: by hand."""
    forward, backward = roofline.masked_attention(1, 4096, 32, 32, 128)
    assert forward.flops == 4 * 4096**2 * 128 * 32 / 2
    assert backward.flops == 2.5 * forward.flops
    assert forward.bytes == pytest.approx(4 * 4096 * 4096 * 2 + 4096 * 32 * 4)
    half, _ = roofline.masked_attention(1, 4096, 32, 32, 128, open_share=0.5)
    assert half.flops == forward.flops / 2
    assert roofline.masked_swiglu(10, 100)[0].bytes == 3 * 10 * 100 * 2 + 400
    assert roofline.H100.seconds(roofline.Work(3.35e12, 0)) == pytest.approx(1)
    assert roofline.H100.seconds(roofline.Work(0, 2 * 989e12)) == pytest.approx(2)
