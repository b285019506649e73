"""Bad input is one clear line and exit status 2, before any process group starts."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shear_tron import cli
from shear_tron.parallel import topology


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scribble(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def other_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<end>", "<stop>"))


OVERRIDES = {
    "target larger than source": (["prune.target.hidden=64"], "target hidden=64 is larger than the source's 48"),
    "target heads larger": (["prune.target.heads=16"], "query heads per key-value head=4 is larger"),
    "heads do not split over tp": (["parallel.tp=3"], "kv_heads=4 does not split over tp=3; use tp of 1, 2, 4"),
    "more stages than layers": (["parallel.pp=5"], "parallel.pp * stages=5 is more than the model's layers=4"),
    "several that do not fit": (
        ["prune.target.layers=9", "prune.target.ffn=65", "data.sequence=65", "parallel.tp=3"],
        "3 problems: (1) target layers=9 is larger than the source's 4; use at most 4, and target ffn=65 is larger "
        "than the source's 64; use at most 64; (2) data.sequence=65 is longer than the model's context=64; use at "
        "most 64; (3) kv_heads=4 does not split over tp=3; use tp of 1, 2, 4",
    ),
    "compiled pruning": (["train.compile=true"], "train.compile goes with neither prune"),
    "world size": (["parallel.dp=4"], "world size 1 does not match parallel: pp=1 x dp=4 x tp=1; start 4 processes"),
    "unknown domain": (["data.weights={colours: 1, treees: 1}"], "domain 'treees' is not in"),
    "weights of no run": (["data.weights=nowhere"], "data.weights=nowhere is not a folder; give the folder of"),
    "sequence too long": (["data.sequence=65"], "data.sequence=65 is longer than the model's context=64"),
    "a weight below 0": (["data.weights={colours: -1}"], "data.weights.colours=-1: Input should be greater than or"),
    "a weight that is no number": (["data.weights={colours: .nan}"], "colours=nan: Input should be a finite number"),
    "memories of 1 and 2": (
        ["optimizer.betas=[1,2]"],
        "(1) optimizer.betas.0=1: Input should be less than 1",
    ),
    "misspelt key": (["train.step=3"], "unknown key 'train.step'; did you mean 'steps'?"),
    "misspelt section": (["parallell.tp=2"], "unknown key 'parallell'; did you mean 'parallel'?"),
    "wrong type": (["train.steps=many"], "train.steps='many'"),
    "no such model": (["model=nowhere"], "nowhere"),
    "no such data": (["data.folder=nowhere"], "data folder nowhere holds no domains.json"),
    "batch does not split": (["train.batch=8", "train.micro_batch=3"], "batch=8 is not a multiple of micro_batch=3"),
    "warm-up longer than the run": (["prune.warmup_steps=14"], "prune.warmup_steps=14"),
    "nothing to prune": (["prune.target={}"], "as large as the source"),
    "copy to nowhere": (["checkpoint.upload=nowhere://x"], "=nowhere://x cannot be used (Protocol not known: nowhere)"),
    "references without a domain": (["data.reference_losses={trees: 1.0}"], "has no reference loss"),
}
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated safetensors": (truncate, "model.safetensors"),
    "corrupt safetensors": (scribble, "model.safetensors"),
    "another tokenizer": (other_tokenizer, "prepare the data with the model's tokenizer"),
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command prints."""
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (error,) = re.findall(r"^shear-tron .*", said, re.M)  # one line beside progress bars
    assert error.startswith(f"shear-tron {arguments[0]}: ")
    return error


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise AssertionError("a process group was started")

    monkeypatch.setattr(topology, "start", start)


def test_show_reads_the_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(world / "prune.yaml")]) == 0
    told = capsys.readouterr().out
    assert "made with this model's tokenizer" in told
    assert re.search(r"colours: [\d,]+ tokens, [\d.]+ epochs at weight 0\.3\d; \d+ held-out windows\n", told)
    assert cli.main(["show", str(world / "prune.yaml"), "data.evaluate_windows=9999", "train.steps=4000"]) == 0
    told = capsys.readouterr().out
    assert "held-out windows (fewer than evaluate_windows=9999)" in told
    assert "more than the 4 that cost little" in told
    assert "domain 'treees' is not in" in refused(capsys, "show", str(world / "prune.yaml"), "data.weights={treees: 1}")


@pytest.mark.parametrize(("overrides", "message"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_bad_config(
    world: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"run={tmp_path}/run"
    assert message in refused(capsys, "train", str(world / "prune.yaml"), run, *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_model(
    world: Path, tmp_path: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    damage(tmp_path / "model")
    overrides = [f"run={tmp_path}/run", f"model={tmp_path}/model"]
    assert message in refused(capsys, "train", str(world / "prune.yaml"), *overrides)


def test_empty_domain(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "prepare.yaml").write_text(
        f"output: {tmp_path}/data\ntokenizer: {world}/model\ndomains: {{void: {{path: {tmp_path}/nothing.jsonl}}}}\n"
    )
    assert "void" in refused(capsys, "prepare", str(tmp_path / "prepare.yaml"))


def test_output_inside_a_domain(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prepare.yaml").write_text(
        f"output: {tmp_path}/text/out\ntokenizer: {world}/model\ndomains: {{all: {{path: {tmp_path}/text}}}}\n"
    )
    shutil.copytree(world / "text", tmp_path / "text")
    told = refused(capsys, "prepare", str(tmp_path / "prepare.yaml"))
    assert f"output={tmp_path}/text/out is inside domain 'all', path={tmp_path}/text; write somewhere else" in told
    (tmp_path / "text" / "state.json").write_text('{"_data_files": [1]}')
    told = refused(capsys, "prepare", str(tmp_path / "prepare.yaml"), f"output={tmp_path}/out")
    assert "state.json has no list of _data_files; save the dataset again" in told


def test_extract_and_export_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("extract", "export"):
        assert "is no run folder" in refused(capsys, verb, str(tmp_path), str(tmp_path / "out"))
