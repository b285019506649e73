"""A sheared model goes wherever others take it, and comes back."""

import json
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from faults import DIE, Disk, Fault
from safetensors.torch import load_file

from shear_tron import cli
from shear_tron.checkpoint import huggingface, sharded
from shear_tron.data.manifest import Manifest
from shear_tron.data.sampler import Sampler

FITS = ["prune.target.heads=4", "prune.target.kv_heads=4"]  # 4 heads of 8 = hidden 32, as nanotron wants it


@pytest.fixture(scope="module")
def pruned(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "prune"
    assert (
        cli.main(["train", str(world / "prune.yaml"), f"run={run}", "train.steps=7", "checkpoint.every=0", *FITS]) == 0
    )
    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("options", [["--flavour", "main"], ["--flavour", "0.4", "--tp", "2"]], ids=["main", "0.4"])
def test_to_nanotron_and_back(
    options: list[str], pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], world: Path
) -> None:
    assert cli.main(["extract", str(pruned), str(tmp_path / "small")]) == 0
    assert cli.main(["extract", str(pruned), str(tmp_path / "nanotron"), "--to", "nanotron", *options]) == 0
    assert "files read back by nanotron's own classes" in capsys.readouterr().out
    back = ["import", str(tmp_path / "nanotron"), str(tmp_path / "back"), "--tokenizer", str(world / "model")]
    assert cli.main(back) == 0
    before, after = tensors(tmp_path / "small"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("small", "back"))
    assert one == other


def test_the_very_next_samples_go_along(pruned: Path, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "next"
    assert cli.main(["extract", str(pruned), str(out), "--to", "nanotron", "--samples", "16"]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["tokens"]["train_steps"] == 2
    (stage,) = config["data_stages"]
    (folder,) = stage["data"]["dataset"]["dataset_folder"]
    assert "s3" in folder
    assert config["model"]["model_config"] == json.loads((out / "model_config.json").read_text())
    tokenizer, size = (Path(folder) / "00000.ds.metadata").read_text().splitlines()[0].split("|")
    assert tokenizer == config["tokenizer"]["tokenizer_name_or_path"]
    found = np.fromfile(Path(folder) / "00000.ds", dtype=f"<u{size}").reshape(16, 17)

    manifest = Manifest.read(str(world / "data"))
    checkpoint = sharded.latest(pruned)
    assert checkpoint is not None
    progress = sharded.progress(checkpoint)
    weights = progress.state["mixture"]["weights"]
    sampler = Sampler(manifest, list(weights), 16, 0)
    fresh = sampler.read(sampler.draw(7 * 8, list(weights.values())))
    sampler.restore(progress.state["sampler"])
    expected = sampler.read(sampler.draw(16, list(weights.values())))
    assert (found == expected.numpy()).all()
    assert not (found[:8] == fresh[:8].numpy()).all()


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_to_gguf(dtype: str, pruned: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    assert cli.main(["extract", str(pruned), str(tmp_path / "small")]) == 0
    file = tmp_path / "out/small.gguf"
    assert cli.main(["extract", str(pruned), str(file), "--to", "gguf", "--dtype", dtype]) == 0
    before = LlamaForCausalLM.from_pretrained(tmp_path / "small")
    after = LlamaForCausalLM.from_pretrained(tmp_path / "out", gguf_file="small.gguf", dtype=torch.float32)
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.allclose(one, other, atol=0 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--to", "gguf"], "out is no name of a GGUF file; use"),
        (["--dtype", "q8_0"], "dtype=q8_0 is GGUF's; for huggingface use float32, bfloat16 or float16"),
        (["--samples", "8"], "only nanotron's main branch reads token shards"),
        (["--to", "nanotron", "--flavour", "0.4", "--samples", "8"], "only nanotron's main branch"),
        (["--to", "nanotron", "--samples", "9"], "samples=9 are not whole steps; use a multiple of train.batch=8"),
        (["--to", "nanotron", "--tp", "3"], "kv_heads=4 does not split over tp=3"),
        (["--model", "nowhere"], "nowhere, which"),
        (["--step", "3"], "has no checkpoint of step 3; it has step-00000007"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    options: list[str], match: str, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["extract", str(pruned), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert match in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nanotron_refuses_more_heads_than_hidden(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", str(world / "prune.yaml"), f"run={run}", "prune=null", "train.steps=1"]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--to", "nanotron"]) == 2
    assert "hidden=48 is not heads=12 times head_dim=8" in capsys.readouterr().err


def test_a_run_is_exported_from_elsewhere_and_after_it_moved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative paths of a run's config count from where it was started."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(world / "model", home / "models/big")
    monkeypatch.chdir(home)
    options = ["run=runs/one", "model=models/big", "prune=null", "train.steps=1"]
    assert cli.main(["train", str(world / "prune.yaml"), *options]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "home/runs/one", "elsewhere"]) == 0
    home.rename(tmp_path / "moved")
    assert cli.main(["export", "moved/runs/one", "after"]) == 0
    shutil.move("moved/runs/one", "alone")
    capsys.readouterr()
    assert cli.main(["export", "alone", "gone"]) == 2
    assert (
        "models/big, which alone was trained from, is not there; say where it is with --model"
        in capsys.readouterr().err
    )
    assert cli.main(["export", "alone", "told", "--model", "moved/models/big"]) == 0
    first = tensors(tmp_path / "elsewhere")
    assert all(torch.equal(first[name], tensors(tmp_path / "told")[name]) for name in first)
    assert cli.main(["export", "lone", "gone"]) == 2
    assert "lone is no run folder" in capsys.readouterr().err


def test_an_export_can_be_published(pruned: Path, world: Path, tmp_path: Path) -> None:
    """A card with shape, lineage, mixture and losses; the lineage of a continued model tells of both runs."""
    from transformers import GenerationConfig

    from shear_tron.train import metrics

    source = tmp_path / "big"
    shutil.copytree(world / "model", source)
    (source / "LICENSE").write_text("as is")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert cli.main(["extract", str(pruned), str(tmp_path / "small"), "--model", str(source)]) == 0
    continued = [f"run={tmp_path}/run", f"model={tmp_path}/small", "prune=null", "train.steps=3"]
    assert cli.main(["train", str(world / "prune.yaml"), *continued]) == 0
    assert cli.main(["export", f"{tmp_path}/run", f"{tmp_path}/final"]) == 0
    for folder in ("small", "final"):
        assert (tmp_path / folder / "LICENSE").read_text() == "as is"
        assert (tmp_path / folder / "chat_template.jinja").read_text() == "{{ messages }}"
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id is None

    first, second = ((tmp_path / folder / "README.md").read_text() for folder in ("small", "final"))
    assert "| source | 48 | 4 | 12 | 4 | 8 | 64 | 320 |\n| this model | 32 | 2 | 4 | 4 | 8 | 32 | 320 |" in first
    lines = second.split("## Lineage\n\n")[1].split("\n\n")[0].splitlines()
    assert lines[0] in first
    assert "pruned to" in lines[0]
    assert "7 steps, 896 tokens of 16 a sample" in lines[0]
    assert f"shear-tron extract {pruned} {tmp_path}/small" in lines[0]
    assert lines[1].startswith("1. small: ")
    last = metrics.read(tmp_path / "run")[-1]
    for name, loss in last["held_out"].items():
        (row,) = [line for line in second.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {loss:.4f} |" in row
        assert f"| {last['weights'][name]:.3f} |" in row
    assert not list(tmp_path.glob(".*"))


SMALL_SHARDS = {"shard_bytes": 20_000}


def die_exporting(command: list[str], where: str) -> None:
    """In a process of its own: killed halfway through a tensor of the third file."""
    huggingface.write.__kwdefaults__.update(SMALL_SHARDS)
    Disk(Path(where), 0, Fault(0, 2, DIE, "write of model-00003-of"), Path(where).parent).watch()
    cli.main(command)


def test_an_export_that_was_killed_while_it_wrote_is_finished_by_the_same_command(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(huggingface.write.__kwdefaults__, "shard_bytes", SMALL_SHARDS["shard_bytes"])
    where = tmp_path / "out"
    command = ["extract", str(pruned), str(where / "small")]

    def files() -> dict[str, bytes]:
        return {str(file.relative_to(where)): file.read_bytes() for file in where.rglob("*") if file.is_file()}

    assert cli.main(command) == 0
    whole = files()
    shutil.rmtree(where)

    process = get_context("forkserver").Process(target=die_exporting, args=(command, str(where)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed").read_text().startswith("write of model-00003-of")
    (left,) = {Path(file).parts[0] for file in files()}
    assert left.startswith(".small.")

    assert cli.main(command) == 0
    assert files() == whole


def test_what_a_killed_export_left_is_cleared(pruned: Path, tmp_path: Path) -> None:
    left = tmp_path / ".small.0123abcd.partial/small"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".smaller.0123abcd.partial").mkdir()
    assert cli.main(["extract", str(pruned), str(tmp_path / "small")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".smaller.0123abcd.partial", "small"]
