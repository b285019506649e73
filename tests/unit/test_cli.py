"""Verbs that need no model of ours."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from shear_tron import cli
from shear_tron.arguments import EXAMPLE, VERBS, parse

ROOT = Path(__file__).parents[2]

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


@pytest.mark.slow
def test_bench_without_a_gpu_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU to measure")
    assert cli.main(["bench", "--op", "swiglu", "--model", "1.3B"]) == 0
    assert "No CUDA device" in capfd.readouterr().out


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


def test_help_fits_a_screen_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 23  # and the shell's next line
    assert max(map(len, lines)) <= 80
    assert any("shear-tron train prune.yaml --nproc 2" in line for line in lines)


def test_overrides_may_come_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    train = next(line.split()[1:] for line in EXAMPLE.splitlines() if " train " in line)
    assert train[-1] == "train.steps=400"
    assert parse(train).overrides == ["train.steps=400"]
    assert parse(["plan", "a.yaml", "--gpus", "8", "b.c=d"]).given == ["a.yaml", "b.c=d"]
    with pytest.raises(SystemExit):
        parse([*train, "--no-such=option"])
    assert "unrecognized arguments: --no-such=option" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert re.fullmatch(r"shear-tron \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["--help"], ["config", "train.steps"], ["config", "prune"]], ids=" ".join)
def test_questions_about_usage_need_no_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.modules['torch'] = None; from shear_tron import cli; cli.main({arguments})"
    assert python("-c", code).stderr == ""


@pytest.mark.slow
def test_show_imports_no_engine() -> None:
    """torch is a second to wait for; its distributed tensors and checkpoints would be half a second more."""
    code = (
        "import sys; from shear_tron import cli; cli.main(['show', 'examples/sheared-llama/prune-1.3b.yaml']); "
        "print([name for name in ('torch.distributed.tensor', 'torch.distributed.checkpoint', 'datatrove') "
        "if name in sys.modules])"
    )
    assert python("-c", code, cwd=ROOT).stdout.splitlines()[-1] == "[]"


def test_a_wheel_has_every_file_that_is_no_code() -> None:
    """A checkout hides what package-data forgets."""
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["shear_tron"]
    package = ROOT / "shear_tron"
    there = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
    assert {name for name in there if not name.endswith((".py", ".pyc"))} == set(given)


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m shear_tron config | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_an_unforeseen_error_is_one_line_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: object) -> None:
        raise KeyError("spanner")

    monkeypatch.setattr(cli, "stats", broken)
    assert cli.main(["stats", "nowhere"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    found = re.fullmatch(r"shear-tron stats: 'spanner' \(KeyError\); (\S+) says where, as does --debug", line)
    assert found
    trace = Path(found[1])
    assert "in broken" in trace.read_text()
    trace.unlink()
    with pytest.raises(KeyError):
        cli.main(["stats", "nowhere", "--debug"])


def test_bad_input_is_one_line_unless_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        "shear-tron stats: data folder nowhere holds no domains.json; make it with `shear-tron prepare`\n"
    )
    with pytest.raises(ValueError, match="nowhere"):
        cli.main(["stats", "nowhere", "--debug"])


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("shear-tron ge", {"generate "}),
        ("shear-tron train prune.yaml train.st", {"train.steps="}),
        ("shear-tron config prune.warm", {"prune.warmup_steps "}),
        ("shear-tron plan --gpus-", {"--gpus-per-node "}),
    ],
)
def test_a_shell_completes(typed: str, offered: set[str], tmp_path: Path) -> None:
    """As argcomplete's shell code asks."""
    given = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE_SHELL": "bash"}
    given |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"), "_ARGCOMPLETE_SUPPRESS_SPACE": "0"}
    code = "import sys; sys.modules['torch'] = None; from shear_tron import cli; cli.main()"
    python("-c", code, env={**os.environ, **given})
    assert set((tmp_path / "offered").read_text().split("\v")) == offered


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as stopped:
            cli.main([verb, "--help"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: shear-tron {verb} ")


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().err.splitlines()[-1] == "shear-tron: error: the following arguments are required: VERB"
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert capsys.readouterr().err.endswith("error: the following arguments are required: config\n")
