"""A Hub id is a folder once it is fetched, and it is fetched once. The Hub is a server on this machine."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.cli import hf
from stand_in_hub import COMMIT, StandIn, stand_in

from shear_tron.hub import is_id, located

ROOT = Path(__file__).parents[2]
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "LICENSE": b"as is",
    "model-00001-of-00001.safetensors": b"weights",
    "consolidated.safetensors": b"the same weights",
    "pytorch_model.bin": b"a pickle",
    "consolidated.00.pth": b"a pickle",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"the same weights",
}
SMALL = {"config.json", "tokenizer.json", "LICENSE"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name, content in FILES.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(content)
    with stand_in("some/model", tmp_path / "repository") as found:
        found.be_the_hub(monkeypatch, tmp_path / "cache")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield found


def test_first_what_is_small_and_then_safetensors_and_never_a_pickle(hub: StandIn) -> None:
    folder = Path(located("some/model"))
    assert {file.name for file in folder.iterdir()} == SMALL == set(hub.fetched)
    assert Path(located("some/model", weights=True)) == folder
    assert {file.name for file in folder.iterdir()} == SMALL | {"model-00001-of-00001.safetensors"}
    assert len(hub.fetched) == len(set(hub.fetched))  # nothing twice
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == b"weights"


def test_what_is_here_is_used_without_asking(hub: StandIn) -> None:
    folder, asked = located("some/model", weights=True), hub.asked
    assert located("some/model", weights=True) == located("hf://some/model") == folder
    assert located(f"hf://some/model@{COMMIT}", weights=True) == folder
    assert located("some/model", fetch=False) == folder
    assert hub.asked == asked
    assert located("other/model", fetch=False) == "other/model"
    assert hub.asked == asked


def test_a_folder_is_not_taken_for_an_id(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path must not become a download of whatever somebody put under that name."""
    for path in ("model", "./some/model", "../some/model", "/some/model", "some/model/deep", "some/tokenizer.json"):
        assert located(path) == path
    Path("some").mkdir()
    assert located("some/model") == "some/model"
    assert not hub.asked
    assert is_id("hf://some/model")
    assert located("hf://some/model") != "hf://some/model"
    with pytest.raises(ValueError, match="hf:///model is no Hub id; write hf://org/name"):
        located("hf:///model")


def test_what_cannot_be_fetched_is_one_line_that_says_what_to_do(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no/model is no folder here, and no/model cannot be fetched from the Hub"):
        located("no/model")
    (hub.folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no safetensors, and pickled weights are never loaded"):
        located("some/model", weights=True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # nobody answers
    with pytest.raises(ValueError, match=r"ConnectError.* run: hf download my/model --include '\*.json'") as caught:
        located("my/model", weights=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("weights", "given"), [(False, "some/model"), (True, f"hf://some/model@{COMMIT}")])
def test_the_command_of_the_error_fetches_what_would_have_been(
    weights: bool, given: str, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="hf download") as caught:
            located(given, weights)
    command = str(caught.value).split(" run: hf ")[1].split(", and give")[0]
    command = command.replace("FOLDER", str(tmp_path / "by-hand"))
    hf.app(shlex.split(command), standalone_mode=False)
    wanted = SMALL | ({"model-00001-of-00001.safetensors"} if weights else set())
    assert {file.name for file in (tmp_path / "by-hand").iterdir() if file.name != ".cache"} == wanted


def test_ranks_that_start_together_fetch_once(hub: StandIn, tmp_path: Path) -> None:
    code = "from shear_tron.hub import located; print(located('hf://some/model', weights=True))"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    said = {process.communicate()[0] for process in started}
    assert len(said) == 1
    assert all(process.returncode == 0 for process in started)
    assert sorted(hub.fetched) == sorted(SMALL | {"model-00001-of-00001.safetensors"})
