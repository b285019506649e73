"""Every verb takes a model in whatever form it has: a Hugging Face folder, a nanotron checkpoint, a Hub id."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stand_in_hub import StandIn, stand_in

from shear_tron import cli
from shear_tron.architecture import Architecture
from shear_tron.checkpoint import huggingface, nanotron
from shear_tron.params import params
from shear_tron.shape import Shape

SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=24, vocab=320)
PRUNE = [
    "prune.target={ffn: 16}", "prune.warmup_steps=1", "train.steps=2", "train.batch=2", "checkpoint.every=0",
    "data.update_every=0", "data.reference_losses=null", "data.evaluate_windows=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def twins(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model twice: ``hf``, and ``nano``, in two pieces with neighbouring rows of heads."""
    folder = tmp_path_factory.mktemp("twins")
    architecture, noise = Architecture(SHAPE, context=64), torch.Generator().manual_seed(0)
    tensors = {p.name: 0.1 * torch.randn(p.size, generator=noise) for p in params(architecture)}
    huggingface.write(folder / "hf", architecture, tensors.items(), tokenizer_from=world / "model")
    nanotron.write(folder / "nano", architecture, tensors.items(), flavour="0.4", tp=2, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def pruned(world: Path, twins: Path) -> dict[str, torch.Tensor]:
    """What comes out where the model is a Hugging Face folder."""
    return prune(world, twins / "run", f"model={twins}/hf")


def prune(world: Path, run: Path, *options: str) -> dict[str, torch.Tensor]:
    assert cli.main(["train", str(world / "prune.yaml"), f"run={run}", *PRUNE, *options]) == 0
    assert cli.main(["extract", str(run), f"{run}-out"]) == 0
    return load_file(f"{run}-out/model.safetensors")


def test_a_nanotron_checkpoint_is_sheared_like_its_twin(
    world: Path, twins: Path, pruned: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    given = [f"model={twins}/nano", f"tokenizer={world}/model"]
    found = prune(world, tmp_path / "run", *given)
    assert found.keys() == pruned.keys()
    assert all(torch.equal(found[name], pruned[name]) for name in found)


def test_a_nanotron_checkpoint_is_shown_planned_and_spoken_with(
    world: Path, twins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for options in ([f"model={twins}/hf"], [f"model={twins}/nano", f"tokenizer={world}/model"]):
        assert cli.main(["show", str(world / "prune.yaml"), *PRUNE, *options]) == 0
        assert cli.main(["plan", str(world / "prune.yaml"), *PRUNE, *options, "--gpus", "1"]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("model ")])
    assert said[0] == said[1]
    assert any("made with this model's tokenizer" in line for line in said[1])
    for options in (["hf"], ["nano", "--tokenizer", f"{world}/model"]):
        assert cli.main(["generate", f"{twins}/{options[0]}", "red orange", "--tokens", "8", *options[1:]]) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert said[2] == said[3] != []
    assert cli.main(["train", str(world / "prune.yaml"), f"run={twins}/none", *PRUNE, f"model={twins}/nano"]) == 2
    assert "is a nanotron checkpoint, which holds no tokenizer; set tokenizer" in capsys.readouterr().err
    assert cli.main(["generate", f"{twins}/nano", "red"]) == 2
    assert "has no tokenizer; say where it is with --tokenizer" in capsys.readouterr().err


@pytest.fixture
def hub(twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.chdir(tmp_path)
    with stand_in("some/model", twins / "hf") as found:
        found.be_the_hub(monkeypatch, tmp_path / "cache")
        yield found


VERBS = {  # and whether they read weights
    "plan": (["--model", "MODEL", "--parameters", "20000", "--gpus", "1"], False),
    "init": (["MODEL", "--data", "WORLD/data", "--tokens", "8000", "--target", "20000"], False),
    "prepare": (["given.yaml", "tokenizer=MODEL"], False),
    "import": (["NANO", "out", "--tokenizer", "MODEL"], False),
    "eval": (["MODEL", "WORLD/data", "--sequence", "16", "--windows", "2"], True),
    "generate": (["MODEL", "red orange", "--tokens", "4"], True),
    "reference-loss": (["given.yaml", "models=[MODEL]"], True),
}
GIVEN = {
    "prepare": "{output: out, workers: 1, held_out: 0.1, domains: {trees: {path: WORLD/text/trees.jsonl}}}",
    "reference-loss": "{folder: WORLD/data, sequence: 16, windows: 2, output: losses.yaml}",
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_hub_id_is_to_every_verb_what_its_folder_is(
    verb: str, hub: StandIn, twins: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It says and writes the same, and fetches weights where it reads them only."""
    options, reads_weights = VERBS[verb]
    (tmp_path / "model").symlink_to(twins / "hf")
    found = []
    for number, model in enumerate(("some/model", str(tmp_path / "model"))):
        here = tmp_path / str(number)
        here.mkdir()
        monkeypatch.chdir(here)

        def filled(text: str, model: str = model) -> str:
            return text.replace("MODEL", model).replace("WORLD", str(world)).replace("NANO", str(twins / "nano"))

        (here / "given.yaml").write_text(filled(GIVEN.get(verb, "")))
        assert cli.main([verb, *map(filled, options)]) == 0
        said = capsys.readouterr().out.replace(model, "MODEL")
        written = {
            str(file.relative_to(here)): file.read_bytes().replace(model.encode(), b"MODEL")
            for file in here.rglob("*")
            if file.suffix in (".yaml", ".ds", ".safetensors")
        }
        found.append((said, written))
    assert found[0] == found[1]
    assert any(file.endswith(".safetensors") for file in hub.fetched) == reads_weights
    assert len(hub.fetched) == len(set(hub.fetched)) > 0


def test_a_hub_id_is_sheared_like_its_folder(
    hub: StandIn, world: Path, pruned: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", str(world / "prune.yaml"), *PRUNE, "model=some/model"]) == 0
    assert not [file for file in hub.fetched if file.endswith(".safetensors")]  # sizes are looked at before that
    found = prune(world, tmp_path / "run", "model=some/model", "tokenizer=some/model")
    assert all(torch.equal(found[name], pruned[name]) for name in pruned)
    assert len(hub.fetched) == len(set(hub.fetched))
    assert "Cut out of some/model " in (tmp_path / "run-out/README.md").read_text()
    capsys.readouterr()
    assert cli.main(["train", str(world / "prune.yaml"), "run=other", *PRUNE, "model=no/model"]) == 2
    said = capsys.readouterr().err
    assert "no/model is no folder here, and no/model cannot be fetched from the Hub" in said
    assert said.count("\n") == 1
