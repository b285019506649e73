"""Nothing that is loaded becomes code: no pickle in the sources, and a pickle in place of an input is refused."""

import ast
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import INPUTS, files, make

from shear_tron.checkpoint.model_folder import open_model
from shear_tron.use.network import load_transformers

ROOT = Path(__file__).parents[2]
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_no_loader_of_pickles_is_called() -> None:
    wrong = []
    for file in [*(ROOT / "shear_tron").rglob("*.py"), *(ROOT / "kernels" / "shear_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ["UnpicklingError"]:
                names.append(node.module or "")  # the error that torch.load raises is no loader
            wrong += [f"{file}: {name}" for name in names if name.split(".")[0] in LOADERS]
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            if called in ("eval", "exec") or (called == "torch.load" and given.get("weights_only") != "True"):
                wrong.append(f"{file}: {called}")
            if called == "yaml.load" and ast.unparse(node.args[1]) != "_Loader":
                wrong.append(f"{file}: {called}")
            if called == "np.load" and given.get("allow_pickle") == "True":
                wrong.append(f"{file}: {called}")
            if called.endswith("Model" + "ForCausalLM.from_pretrained") and given.get("use_safetensors") != "True":
                wrong.append(f"{file}: {called}")
    assert not wrong


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path(BOMB),))  # type: ignore[return-value]


BOMB = "/tmp/shear-tron-bomb"


@pytest.fixture
def bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pickle that leaves a file behind when it is loaded."""
    monkeypatch.setattr(f"{__name__}.BOMB", str(tmp_path / "exploded"))
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb()))
    return tmp_path / "bomb"


def forms(bomb: Path) -> dict[str, bytes]:
    """The ways in which libraries write pickles."""
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save({"model": Bomb()}, archive)
    return {"pickle": bomb.read_bytes(), "numpy": array.getvalue(), "torch": archive.getvalue()}


@pytest.mark.parametrize("kind", INPUTS)
def test_a_pickle_in_place_of_an_input_is_no_code(kind: str, bomb: Path, tmp_path: Path) -> None:
    read, told = make(kind, tmp_path / kind), 0
    for file in files(tmp_path / kind):
        good = file.read_bytes()
        for content in forms(bomb).values():
            file.write_bytes(content)
            try:
                read()
            except ValueError as error:
                told += file.name in str(error)
            assert not (tmp_path / "exploded").exists(), file
        file.write_bytes(good)
    assert told, "no answer names a file"


def test_pickled_weights_are_not_looked_at(bomb: Path, tmp_path: Path) -> None:
    for name in ("model", "network"):
        make(name, tmp_path / name)
    for folder in (tmp_path / "model" / "one", tmp_path / "network" / "hf"):
        (folder / "model.safetensors").unlink()
        shutil.copy(bomb, folder / "pytorch_model.bin")
        for read in (open_model, lambda place: load_transformers(str(place), torch.float32)):
            with pytest.raises(ValueError, match="pickled weights are never loaded"):
                read(folder)
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_is_one(bomb: Path, tmp_path: Path) -> None:
    for name, load in {
        "pickle": pickle.load,
        "numpy": lambda file: np.load(file, allow_pickle=True),
        "torch": lambda file: torch.load(file, weights_only=False),
    }.items():
        load(io.BytesIO(forms(bomb)[name]))
        (tmp_path / "exploded").unlink()
