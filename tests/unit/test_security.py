"""Nothing that is loaded becomes code: no pickle in the sources, and a pickle in place of an input is refused."""

import ast
import pickle
from pathlib import Path

import pytest

from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.huggingface import Weights, read_architecture
from shear_tron.checkpoint.huggingface import write as write_model
from shear_tron.checkpoint.safetensors_stream import open_file
from shear_tron.config import load
from shear_tron.data.manifest import Manifest
from shear_tron.train.config import RunConfig

ROOT = Path(__file__).parents[2]
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_no_loader_of_pickles_is_called() -> None:
    wrong = []
    for file in [*(ROOT / "shear_tron").rglob("*.py"), *(ROOT / "kernels" / "shear_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
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


def test_a_pickle_in_place_of_an_input_is_refused(bomb: Path, tmp_path: Path) -> None:
    import torch

    from shear_tron.architecture import Architecture
    from shear_tron.params import params
    from shear_tron.shape import Shape

    architecture = Architecture(Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16, vocab=32))
    write_model(tmp_path / "model", architecture, [(each.name, torch.ones(each.size)) for each in params(architecture)])
    content = bomb.read_bytes()
    (tmp_path / "data").mkdir()
    (tmp_path / "step-00000003").mkdir()
    places = {
        tmp_path / "model" / "config.json": lambda: read_architecture(tmp_path / "model"),
        tmp_path / "model" / "model.safetensors": lambda: Weights.open(tmp_path / "model", architecture),
        tmp_path / "data" / "domains.json": lambda: Manifest.read(str(tmp_path / "data")),
        tmp_path / "step-00000003" / sharded.PROGRESS: lambda: sharded.progress(tmp_path / "step-00000003"),
        tmp_path / "x.safetensors": lambda: open_file(tmp_path / "x.safetensors"),
        tmp_path / "x.yaml": lambda: load(RunConfig, tmp_path / "x.yaml"),
    }
    for file, read in places.items():
        good = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        with pytest.raises(ValueError, match=file.name):
            read()
        if good is not None:
            file.write_bytes(good)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="pickled weights are never loaded"):
        Weights.open(tmp_path / "model", architecture)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(content)
    assert (tmp_path / "exploded").exists()  # the bomb is one
