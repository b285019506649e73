"""Verbs that need no model of ours."""

import json
from pathlib import Path

import pytest
import yaml

from shear_tron import cli

LLAMA2 = {  # losses of LLaMA-2 7B, 13B and 70B, as the paper's authors measured them
    6738415616: {"cc": 1.7520, "c4": 1.9219},
    13015864320: {"cc": 1.6680, "c4": 1.8486},
    68976648192: {"cc": 1.4621, "c4": 1.6848},
}


def test_reference_loss_predicts_what_the_authors_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump(LLAMA2))
    (tmp_path / "reference.yaml").write_text(f"losses: {tmp_path}/losses.yaml\nparameters: 373867520\n")
    assert cli.main(["reference-loss", str(tmp_path / "reference.yaml")]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["cc"] == pytest.approx(2.1401, abs=1e-3)
    assert predicted["c4"] == pytest.approx(2.3139, abs=1e-3)


def test_bench_without_a_gpu_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU to measure")
    assert cli.main(["bench", "--op", "swiglu", "--model", "1.3B"]) == 0
    assert "No CUDA device" in capfd.readouterr().out


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([verb, "--help"])
        assert stopped.value.code == 0
