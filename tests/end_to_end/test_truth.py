"""A loss that is no number is never a success: nothing moves, nothing is saved, and the run says so."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from runs import as_under_torchrun
from safetensors.torch import load_file, save_file
from torch import Tensor

from shear_tron import cli
from shear_tron.checkpoint import sharded
from shear_tron.files import sha256
from shear_tron.parallel.pipeline import Engine
from shear_tron.train import metrics

HF_NAMES = {"layers.0.up": "model.layers.0.mlp.up_proj.weight", "embed": "model.embed_tokens.weight"}
PLAIN = ["prune=null", "data.update_every=0"]


def state(checkpoint: Path) -> dict[str, Tensor]:
    reader = sharded.Reader(checkpoint)
    return {name: reader.read(name) for name in reader.sizes}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def strict_json(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in a JSON line")

    found: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return found


@pytest.fixture
def broken_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Numbers of calls of the engine, from 0, after which one rank's first gradient is NaN."""
    chosen: set[int] = set()
    break_steps(chosen, monkeypatch.setattr)
    return chosen


def break_steps(chosen: set[int], patch: Any = setattr) -> None:
    import torch.distributed as dist

    train, calls = Engine.train, [0]

    def broken(self: Engine, *arguments: Any) -> Any:
        losses = train(self, *arguments)
        if calls[0] in chosen and dist.get_rank() == dist.get_world_size() - 1:
            next(p.grad for stage in self.stages for p in stage.parameters() if p.grad is not None).mul_(torch.nan)
        calls[0] += 1
        return losses

    patch(Engine, "train", broken)


@pytest.mark.parametrize(("rate", "reason"), [("1e3", "the gradient norm is (0.0|nan);"), ("1e12", "loss is nan")])
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    world: Path, tmp_path: Path, rate: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # At 1e3 the norm is 0.0 or NaN, as the processor rounds; which norms count: unit/test_health.
    wild = [f"optimizer.learning_rate={rate}", "train.steps=8", "checkpoint.every=1", *PLAIN]
    assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *wild]) == 1
    error = capsys.readouterr().err
    assert re.search(rf"3 steps in a row were skipped, the last one because {reason}", error)
    assert "Traceback" not in error
    for checkpoint in sharded.checkpoints(tmp_path / "run"):
        assert all(tensor.isfinite().all() for tensor in state(checkpoint).values())
    lines = [strict_json(line) for line in (tmp_path / "run" / metrics.LOG).read_text().splitlines()]
    *good, first, _, third = [line for line in lines if "step" in line]
    assert all(line["loss"] is not None and "skipped" not in line for line in good)
    assert (first["loss"] is None) == (reason == "loss is nan")
    assert f"samples {8 * (third['step'] - 1)} to {8 * third['step'] - 1} changed nothing" in third["skipped"]


def test_a_source_with_a_nan_weight_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for extra in ([], PLAIN):
        arguments = [f"run={tmp_path}/run", f"model={tmp_path}/model", *extra]
        assert cli.main(["train", str(world / "prune.yaml"), *arguments]) == 1
        assert "layers.1.up holds NaN" in capsys.readouterr().err


def test_a_skipped_step_moves_nothing(world: Path, tmp_path: Path, broken_steps: set[int]) -> None:
    """Weights, moments, gates and multipliers; the broken step is the last, so it is saved."""
    broken_steps.add(4)  # two calls time dense steps
    steps = ["train.steps=3", "prune.warmup_steps=2", "checkpoint.every=1", "checkpoint.keep=9"]
    assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *steps]) == 0
    before, after = (state(sharded.path(tmp_path / "run", step)) for step in (2, 3))
    assert same(before, after)
    line = metrics.read(tmp_path / "run")[-1]
    assert line["gradient_norm"] is None
    assert "the gradient norm is nan; samples 16 to 23 changed nothing" in line["skipped"]


def test_skipping_survives_interruption_to_the_bit(
    world: Path, tmp_path: Path, broken_steps: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shear_tron.train.loop import Trainer

    broken_steps.add(3)
    arguments = ["train", str(world / "prune.yaml"), "train.steps=8", "optimizer.warmup_steps=4"]
    assert cli.main([*arguments, f"run={tmp_path}/never"]) == 0
    update = Trainer._update

    def until(self: Trainer, batches: Any) -> dict[str, Any]:
        if self.step == 6:
            raise ValueError("the power went out")
        return update(self, batches)

    break_steps({3}, monkeypatch.setattr)
    monkeypatch.setattr(Trainer, "_update", until)
    assert cli.main([*arguments, f"run={tmp_path}/run"]) == 1
    monkeypatch.undo()
    assert cli.main([*arguments, f"run={tmp_path}/run"]) == 0
    never, resumed = (sharded.latest(tmp_path / name) for name in ("never", "run"))
    assert never is not None
    assert resumed is not None
    assert same(state(never), state(resumed))


def on_ranks(config: str, overrides: list[str]) -> int:
    as_under_torchrun()
    break_steps({3, 5, 6, 7, 8})
    return cli.main(["train", config, *overrides])


@pytest.mark.parametrize("layout", [[], ["parallel.tp=2"], ["parallel.pp=2"]], ids=["fsdp2", "tp2", "pp2"])
def test_ranks_skip_and_stop_together(world: Path, tmp_path: Path, layout: list[str]) -> None:
    """Only the last rank sees a gradient that is NaN."""
    assert run(2, on_ranks, str(world / "prune.yaml"), [f"run={tmp_path}/run", "checkpoint.every=1", *layout]) == [1, 1]
    lines = metrics.read(tmp_path / "run")
    assert [line["step"] for line in lines if "skipped" in line] == [2, 4, 5, 6]
    assert [folder.name for folder in sharded.checkpoints(tmp_path / "run")] == ["step-00000001", "step-00000003"]


def test_what_is_not_finite_is_not_extracted_or_exported(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of an older version, or one somebody edited."""
    for verb, extra, broken in (
        ("extract", ["prune.warmup_steps=1"], "gates.ffn"),
        ("extract", ["prune.warmup_steps=1"], "layers.0.up"),
        ("export", PLAIN, "embed"),
    ):
        folder = tmp_path / f"{verb}-{broken}"
        assert cli.main(["train", str(world / "prune.yaml"), f"run={folder}", "train.steps=2", *extra]) == 0
        checkpoint = sharded.latest(folder)
        assert checkpoint is not None
        (file,) = checkpoint.glob("*.safetensors")
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        tensors[broken].view(-1)[5] = torch.nan
        progress = sharded.progress(checkpoint).model_dump()
        save_file(tensors, file, metadata=metadata)
        progress["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        (checkpoint / sharded.PROGRESS).write_text(sharded.sealed(progress))
        capsys.readouterr()
        assert cli.main([verb, str(folder), f"{folder}-out"]) == 2
        assert f"{HF_NAMES.get(broken, broken)} holds NaN" in capsys.readouterr().err
        assert not Path(f"{folder}-out").exists()


def test_pruning_that_missed_its_target_is_said(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten steps close nothing to speak of; with units cut by score, the counts are exact."""
    steps = ["train.steps=3", "prune.warmup_steps=2", "data.update_every=0"]
    arguments = ["train", str(world / "prune.yaml"), *steps]
    said = "WARNING: the masks missed the target (closed: "
    assert cli.main([*arguments, f"run={tmp_path}/short", "--strict"]) == 3
    assert said in capsys.readouterr().err
    assert cli.main([*arguments, f"run={tmp_path}/short"]) == 0
    assert said in capsys.readouterr().err
    assert cli.main(["extract", f"{tmp_path}/short", f"{tmp_path}/small"]) == 0
    assert said in capsys.readouterr().out
    assert cli.main([*arguments, f"run={tmp_path}/exact", "prune.method=magnitude", "--strict"]) == 0
    assert "WARNING" not in capsys.readouterr().err
    assert cli.main(["extract", f"{tmp_path}/exact", f"{tmp_path}/other"]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_only_our_checkpoints_count_and_are_deleted(world: Path, tmp_path: Path) -> None:
    plain = [*PLAIN, "train.steps=4", "checkpoint.every=1"]
    assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *plain]) == 0
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000003").rename(folder / "step-original")
    (folder / "step-99999999").mkdir()  # somebody's, without progress.json
    (folder / "step-00000001").symlink_to(folder / "step-original")
    assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/run", *plain, "train.steps=7"]) == 0
    assert [path.name for path in sharded.checkpoints(tmp_path / "run")] == ["step-00000006", "step-00000007"]
    assert (folder / "step-original" / sharded.PROGRESS).is_file()
    assert (folder / "step-99999999").is_dir()
    assert (folder / "step-00000001").is_symlink()


SPIKES = ["train.steps=14", "checkpoint.every=5", "checkpoint.keep=9", "train.rewind_above=2", "data.update_every=0"]


def jump(numbers: set[int], patch: Any = setattr) -> None:
    """The loss of batches jumps by 5 nats: of those that end before these sample numbers."""
    from shear_tron.train.loop import Trainer

    update, broadcast, at = Trainer._update, Engine.broadcast, [0]

    def remembered(self: Trainer, batches: Any) -> dict[str, Any]:
        at[0] = batches.state()["number"] + 8
        return update(self, batches)

    def jumped(self: Engine, *arguments: Any) -> Tensor:
        found = broadcast(self, *arguments)
        return found + 5 if at[0] in numbers else found

    patch(Trainer, "_update", remembered)
    patch(Engine, "broadcast", jumped)


def test_a_loss_that_jumps_takes_the_run_back_past_its_batch(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, from steps 12 and 13 to step 10; a run that is killed in between does the same, to the bit."""
    from shear_tron.train.loop import Trainer

    jump({8 * 12, 8 * 15}, monkeypatch.setattr)
    arguments = ["train", str(world / "prune.yaml"), *SPIKES]
    assert cli.main([*arguments, f"run={tmp_path}/never"]) == 0
    assert "step 12: loss" in (told := capsys.readouterr().err)
    assert "jumped; back to step 10, samples 80 to 95 left out" in told
    lines = metrics.read_lines(tmp_path / "never" / metrics.LOG)
    backs = [line["rewind"] for line in lines if "rewind" in line]
    assert [(each["at"], each["to"], each["samples"]) for each in backs] == [(12, 10, [80, 95]), (13, 10, [80, 119])]
    assert [line["step"] for line in metrics.read(tmp_path / "never")] == list(range(1, 15))
    assert all(line["loss"] < 8 for line in metrics.read(tmp_path / "never"))
    update = Trainer._update

    def until(self: Trainer, batches: Any) -> dict[str, Any]:
        if batches.state()["number"] == 8 * 13:  # after it went back for the first time
            raise ValueError("the power went out")
        return update(self, batches)

    monkeypatch.setattr(Trainer, "_update", until)
    assert cli.main([*arguments, f"run={tmp_path}/run"]) == 1
    monkeypatch.setattr(Trainer, "_update", update)
    assert cli.main([*arguments, f"run={tmp_path}/run"]) == 0
    never, resumed = (sharded.latest(tmp_path / name) or tmp_path for name in ("never", "run"))
    assert same(state(never), state(resumed))
    again = metrics.read_lines(tmp_path / "run" / metrics.LOG)
    assert [line["rewind"] for line in again if "rewind" in line] == backs

    monkeypatch.undo()
    jump({8 * number for number in range(12, 99)}, monkeypatch.setattr)
    assert cli.main([*arguments, f"run={tmp_path}/hopeless"]) == 1
    assert "the loss has jumped 4 times since step 10, last within samples 80 to 119" in capsys.readouterr().err


def rewinding(config: str, overrides: list[str]) -> int:
    as_under_torchrun()
    jump({8 * 12})
    return cli.main(["train", config, *overrides])


def test_ranks_go_back_together(world: Path, tmp_path: Path) -> None:
    settings = [f"run={tmp_path}/run", *SPIKES, "parallel.pp=2", "checkpoint.background=true"]
    assert run(2, rewinding, str(world / "prune.yaml"), settings) == [0, 0]
    assert [line["step"] for line in metrics.read(tmp_path / "run")] == list(range(1, 15))
    assert sum("rewind" in line for line in metrics.read_lines(tmp_path / "run" / metrics.LOG)) == 1
