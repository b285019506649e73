"""A flipped byte anywhere is found, where it is used and by `verify`; wrong folders are told apart."""

import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run
from runs import as_under_torchrun, final_state

from shear_tron import cli
from shear_tron.architecture import Architecture
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.model_folder import Form, write_model
from shear_tron.params import params
from shear_tron.shape import Shape

STEPS = ["train.steps=3", "prune.warmup_steps=2", "checkpoint.every=1", "data.update_every=0"]


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    assert cli.main(["train", str(world / "prune.yaml"), f"run={world}/trained", *STEPS]) == 0
    return world / "trained"


def flip(file: Path, draw: random.Random, after: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(after, len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def test_whole_folders_are_told_in_plain_words(
    trained: Path, world: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint, theirs = sharded.latest(trained), tmp_path / "nanotron"
    small = Architecture(Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16, vocab=32))
    tensors = [(each.name, torch.ones(each.size)) for each in params(small)]
    write_model(theirs, small, tensors, Form("nanotron"), world / "model")
    for folder, text in (
        (theirs, "a nanotron checkpoint, whole: "),
        (world / "data", "prepared data, whole: 3 domains, "),
        (world / "model", "a Hugging Face model, whole: "),
        (trained, "a run, whole: checkpoints of steps 2, 3"),
        (checkpoint, "a checkpoint, whole: step 3"),
    ):
        assert cli.main(["verify", str(folder)]) == 0
        assert f"{folder}: {text}" in capsys.readouterr().out
    part = next(theirs.rglob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-8])
    for folder in (tmp_path, tmp_path / "none", theirs):
        assert cli.main(["verify", str(folder)]) == 2


def test_flipped_bits_are_found(trained: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(world / "data", tmp_path / "data")
    files = [*(tmp_path / "run" / "checkpoints").rglob("*.*"), *(tmp_path / "data").rglob("*.ds*")]
    files = [file for file in files if file.is_file() and file.suffix != ".metadata"] + [
        tmp_path / "data" / "domains.json"
    ]
    for file in files:
        good = file.read_bytes()
        for _ in range(4 if file.suffix != ".json" else 20):
            flip(file, draw)
            folder = tmp_path / file.relative_to(tmp_path).parts[0]
            status = cli.main(["verify", str(folder)])
            error = capsys.readouterr().err
            harmless = file.name == "domains.json"  # a name of a licence, a share: nobody can tell
            assert status == 2 or harmless, file
            lines = [line for line in re.split(r"[\r\n]+", error) if line and "/s]" not in line]  # beside progress bars
            assert len(lines) == (status != 0), error
            file.write_bytes(good)
    assert cli.main(["verify", str(tmp_path / "data")]) == 0
    assert cli.main(["verify", str(tmp_path / "run")]) == 0
    flip(next((tmp_path / "data").rglob("held_out/*.ds")), draw)
    train = ["train", str(world / "prune.yaml"), f"run={tmp_path}/other", f"data.folder={tmp_path}/data", *STEPS]
    assert cli.main([*train, "data.verify=true"]) == 1
    assert "does not have its sha256: it is damaged" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_used(
    trained: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tensors: D7. Its header, its numbers, its folder's name: D10, D7."""
    draw = random.Random(1)
    shutil.copytree(trained, tmp_path / "run")
    arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *STEPS, "train.steps=4"]
    checkpoint = sharded.latest(tmp_path / "run")
    assert checkpoint is not None
    tensors, progress = next(checkpoint.glob("*.safetensors")), checkpoint / sharded.PROGRESS
    for file, after, status in ((tensors, 2000, 1), (tensors, 0, 1), (progress, 0, 2)):
        good = file.read_bytes()
        flip(file, draw, after)
        capsys.readouterr()
        assert cli.main(arguments) == status
        error = capsys.readouterr().err
        assert "use an earlier" in error
        assert "Traceback" not in error
        file.write_bytes(good)
    assert cli.main(["extract", str(tmp_path / "run"), str(tmp_path / "fine")]) == 0
    shutil.copy(tensors, checkpoint / "more.safetensors")
    assert cli.main(arguments) == 2
    assert "more.safetensors is no part of that checkpoint" in capsys.readouterr().err
    (checkpoint / "more.safetensors").unlink()
    checkpoint.rename(checkpoint.with_name("step-00000009"))
    assert cli.main(arguments) == 2
    assert "holds step 3; give the folder its own name back" in capsys.readouterr().err


def test_folders_are_not_confused(
    trained: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D14: a run never takes a model's or the data's folder, nor goes on without its config."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "file").write_text("")
    train = ["train", str(world / "prune.yaml"), *STEPS]
    for folder, message in (
        (world / "model", "is model too; give a folder of its own"),
        (world / "data", "is data.folder too"),
        ("''", "run is empty"),
        (tmp_path / "file", "is a file"),
    ):
        assert cli.main([*train, f"run={folder}"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*train, f"run={tmp_path}/run", f"checkpoint.upload=file://{tmp_path}/run"]) == 2
    assert "is the run's own folder" in capsys.readouterr().err
    assert cli.main(["extract", f"{tmp_path}/run", f"{tmp_path}/run/checkpoints/small"]) == 2
    assert "is among the checkpoints of" in capsys.readouterr().err
    config = tmp_path / "run" / "config.yaml"
    whole = config.read_text()
    damaged = (("run: [", "though there are checkpoints beside it"), ("- 1", "not a config"), (None, "No such file"))
    for text, message in damaged:
        config.unlink()
        if text is not None:
            config.write_text(text)
        else:
            config.with_name("other.yaml").write_text(whole)
        assert cli.main([*train, f"run={tmp_path}/run"]) == 2
        assert message in capsys.readouterr().err
        config.write_text(whole)


def test_a_run_changes_on_purpose_only(
    trained: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *STEPS, "train.steps=4"]
    rate = ["optimizer.learning_rate=1e-4", "train.micro_batch=2"]
    assert cli.main([*arguments, *rate]) == 2
    assert "--allow-change" in capsys.readouterr().err
    assert cli.main([*arguments, "train.seed=3", "--allow-change", "train.seed"]) == 2
    assert "may change in a run that goes on" in capsys.readouterr().err
    allowed = ["--allow-change", "optimizer.learning_rate", "--allow-change", "train.micro_batch"]
    assert cli.main([*arguments, *rate, *allowed]) == 0
    kept = (tmp_path / "run" / "config.until-step-00000003.yaml").read_text()
    assert "learning_rate: 0.001" in kept
    assert "learning_rate: 0.0001" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_without_a_checkpoint_binds_nobody(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("half a con")
    assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *STEPS]) == 0


def on_ranks(arguments: list[str]) -> int:
    """What torchrun does: the same command on every rank (which has joined the process group already)."""
    as_under_torchrun()
    return cli.main(arguments)


def on_ranks_with_folders_of_their_own(arguments: list[str], folders: list[str]) -> int:
    return on_ranks([*arguments, f"run={folders[dist.get_rank()]}"])


def test_a_run_whose_folder_not_all_ranks_have_does_not_go_on(trained: Path, world: Path, tmp_path: Path) -> None:
    """Some would go on from the checkpoint, others begin anew."""
    shutil.copytree(trained, tmp_path / "run")
    arguments = ["train", str(world / "prune.yaml"), *STEPS, "train.steps=4", "parallel.dp=2"]
    folders = [str(tmp_path / "run"), str(tmp_path / "other")]
    assert run(2, on_ranks_with_folders_of_their_own, arguments, folders) == [1, 1]
    assert sharded.step_of(sharded.latest(tmp_path / "run") or Path()) == 3


@pytest.mark.parametrize("moments", ["false", "true"], ids=["weights", "moments"])
def test_a_new_run_starts_from_another_in_any_layout(trained: Path, world: Path, tmp_path: Path, moments: str) -> None:
    """A step at a rate of nothing: the other run's weights to the bit, and one process's moments up to rounding."""
    settings = ["prune=null", "train.steps=1", "data.update_every=0", "optimizer.learning_rate=1e-30"]
    settings += ["data.reference_losses=null", f"init_from={{run: {trained}, optimizer: {moments}}}"]
    train = ["train", str(world / "prune.yaml"), *settings]
    assert cli.main([*train, f"run={tmp_path}/one"]) == 0
    before, one = final_state(trained), final_state(tmp_path / "one")
    for name, layout in (("tp", ["parallel.tp=2"]), ("pp", ["parallel.pp=2"]), ("fsdp", [])):
        assert run(2, on_ranks, [*train, f"run={tmp_path}/{name}", *layout]) == [0, 0]
        found = final_state(tmp_path / name)
        assert found.keys() == one.keys()
        for key, tensor in found.items():
            if key.startswith("adam."):
                torch.testing.assert_close(tensor, one[key], rtol=1e-4, atol=1e-8)
            else:
                assert torch.equal(tensor, before[key]), key
    pruning = [*STEPS, *settings[2:]]  # a run with masks starts from it too
    assert run(2, on_ranks, ["train", str(world / "prune.yaml"), f"run={tmp_path}/masks", *pruning]) == [0, 0]
    found = final_state(tmp_path / "masks")
    assert all(torch.equal(found[key], before[key]) for key in one if not key.startswith("adam."))


def test_a_new_run_starts_from_another(
    trained: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of the other run, and its moments if asked: a rate of nothing leaves them as they are."""
    plain = ["prune=null", "train.steps=1", "data.update_every=0", "optimizer.learning_rate=1e-30"]
    before = sharded.Reader(sharded.latest(trained) or trained)
    for moments in ("false", "true"):
        start = [f"init_from={{run: {trained}, optimizer: {moments}}}", f"run={tmp_path}/{moments}"]
        assert cli.main(["train", str(world / "prune.yaml"), *plain, *start]) == 0
        after = sharded.Reader(sharded.latest(tmp_path / moments) or tmp_path)
        for name in ("embed", "layers.0.up", "norm"):
            assert torch.equal(before.read(name), after.read(name))
        progress = sharded.progress(sharded.latest(tmp_path / moments) or tmp_path)
        assert progress.state["updates_before"] == (3 if moments == "true" else 0)
    warm, cold = (sharded.Reader(sharded.latest(tmp_path / name) or tmp_path) for name in ("true", "false"))
    name = "adam.layers.0.up.exp_avg"
    torch.testing.assert_close(warm.read(name) - cold.read(name), 0.9 * before.read(name), rtol=1e-4, atol=1e-9)
    capsys.readouterr()
    for other, message in ((f"{world}/data", "is no run folder"), (f"{tmp_path}/none", "is no run folder")):
        refused = [f"init_from={{run: {other}}}", f"run={tmp_path}/refused"]
        assert cli.main(["train", str(world / "prune.yaml"), *plain, *refused]) == 2
        assert message in capsys.readouterr().err
