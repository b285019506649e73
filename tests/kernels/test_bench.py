"""The benchmark's runner on a machine without a GPU, and its pictures."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def result(rival: str, model: str, closed: float, direction: str, milliseconds: float) -> run.Result:
    about = {"gpu": "G", "torch": "t", "triton": "t", "commit": "c", "date": "d"}
    numbers = (milliseconds, 0.1, 0.0, 1.0, 0.5, 1.0)
    return run.Result("masked_attention", model, 4096, closed, rival, direction, *numbers, **about)


def test_only_rivals_of_every_row_are_ranked_with_all_heads_open(capsys: pytest.CaptureFixture[str]) -> None:
    """sdpa_cudnn is fastest but cannot run model B; at 25 % closed the kernel would win; torch's flash wins."""
    rows = [
        result(rival, model, closed, direction, milliseconds)
        for model in ("A", "B")
        for direction in ("forward", "backward")
        for closed, times in ((0.0, (3.0, 2.0, 1.0)), (0.25, (1.0, 2.0, 1.0)))
        for rival, milliseconds in zip(("kernel", "sdpa_flash + multiply", "sdpa_cudnn + multiply"), times, strict=True)
        if (rival, model) != ("sdpa_cudnn + multiply", "B")
    ]
    rows += [
        result(rival, "A", 0.0, "forward", milliseconds)
        for rival, milliseconds in (("kernel, no gate", 2.0), ("sdpa_cudnn, gate folded into o", 1.0))
    ]
    run.print_choice(rows)
    assert capsys.readouterr().out.splitlines() == [
        'for dense_attention.MEASURED: ("G", True): "sdpa_flash",',
        'for dense_attention.MEASURED: ("G", False): "sdpa_cudnn",',
    ]


def test_nothing_is_made_inside_a_timed_backward() -> None:
    """Its upstream gradient exists before: at 2 bytes an element, filling one would be a third of a norm's traffic."""
    ops: list[str] = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ops.append(func.name())
            return func(*args, **(kwargs or {}))

    x = torch.ones(4, requires_grad=True)
    forward, backward = run.calls(lambda x: x * 2, {"x": x})
    for call, wanted in (
        (forward, ["aten::mul.Tensor"]),
        (backward, ["aten::mul.Tensor"]),
        (backward, ["aten::mul.Tensor"]),
    ):
        ops.clear()
        with Recorded():
            call()
        assert ops == wanted
