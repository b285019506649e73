"""Methods of making masks beside the paper's: laws 6 and 12 on whole runs, and units chosen at once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from runs import as_under_torchrun, final_state

from shear_tron import cli
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.huggingface import read_architecture
from shear_tron.train import cache, metrics
from shear_tron.train.loop import Trainer
from shear_tron.train.schedule import learning_rate_factor

SIZES = {"hidden": 32, "layers": 2, "heads": 8, "kv_heads": 4, "ffn": 32}


def train(world: Path, run: Path, *overrides: str, status: int = 0) -> None:
    config = [str(world / "prune.yaml"), f"run={run}", "data.update_every=0", *overrides]
    assert cli.main(["train", *config]) == status


@pytest.mark.parametrize("method", ["fisher", "magnitude", "activation", "random"])
def test_interrupted_and_resumed_is_never_interrupted_and_keeps_the_targets_counts(
    world: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them after a rotation, and one that learns from a teacher: those go on as exactly."""
    settings = [f"prune.method={method}", "train.steps=8", "checkpoint.every=3", "prune.calibration_batches=2"]
    settings += {"random": ["prune.rotate=true"], "magnitude": [f"distill.teacher={world}/model"]}.get(method, [])
    train(world, tmp_path / "whole", *settings)
    update = Trainer._update

    def until(self: Trainer, batches: Any) -> dict[str, Any]:
        if self.step == 4:  # a step after the checkpoint, between two closings
            raise ValueError("the power went out")
        return update(self, batches)

    monkeypatch.setattr(Trainer, "_update", until)
    train(world, tmp_path / "parts", *settings, status=1)
    monkeypatch.undo()
    train(world, tmp_path / "parts", *settings)
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name

    lines = metrics.read(tmp_path / "whole")
    closed = [line["expected_ffn_sparsity"] for line in lines]
    wanted = [0.5 * (1 - (1 - min(1, step / 6)) ** 3) for step in range(8)]
    assert closed == pytest.approx(wanted, abs=0.5 / 64 + 1e-9)  # exact counts: to the nearest unit of 64
    assert cli.main(["extract", str(tmp_path / "whole"), str(tmp_path / "small")]) == 0
    shape = read_architecture(tmp_path / "small").shape
    assert {name: getattr(shape, name) for name in SIZES} == SIZES


def test_units_are_chosen_at_once_without_a_step(world: Path, tmp_path: Path) -> None:
    """Score, cut, done; the weights are the source's, and the run's held-out losses those of the model cut out."""
    once = ["prune.method=fisher", "prune.warmup_steps=0", "train.steps=0", "prune.calibration_batches=4"]
    train(world, tmp_path / "once", *once)
    train(world, tmp_path / "once", *once)  # again: the same, not an error
    assert cli.main(["extract", str(tmp_path / "once"), str(tmp_path / "small")]) == 0
    measured = ["prune=null", "train.steps=1", "optimizer.learning_rate=1e-12", f"model={tmp_path}/small"]
    train(world, tmp_path / "measure", *measured)
    cut, dense = (metrics.read(tmp_path / run)[-1]["held_out"] for run in ("once", "measure"))
    assert dense == pytest.approx(cut, abs=1e-5)
    random = [*once, "prune.method=random"]
    train(world, tmp_path / "random", *random)
    assert metrics.read(tmp_path / "random")[-1]["held_out"] != cut


@pytest.mark.parametrize("method", ["fisher", "magnitude", "activation", "random"])
def test_a_target_that_keeps_some_kinds_whole_is_cut_alike_by_replicas(
    world: Path, tmp_path: Path, method: str
) -> None:
    target = ["prune.target={layers: 2, ffn: 32}", "prune.warmup_steps=0", "prune.calibration_batches=2"]
    once = [f"prune.method={method}", *target, "train.steps=0"]
    train(world, tmp_path / "alone", *once)
    run(2, on_ranks, str(world / "prune.yaml"), [f"run={tmp_path}/ranks", *once, "parallel.shard=1"])
    alone, ranks = final_state(tmp_path / "alone"), final_state(tmp_path / "ranks")
    kinds = sorted(name for name in alone if name.startswith("scores."))
    assert kinds == ["scores.ffn", "scores.layers"]
    for kind in kinds:
        assert torch.equal(alone[kind] >= 0, ranks[kind] >= 0), kind


def test_adam_goes_on_across_the_cut_under_one_schedule(world: Path, tmp_path: Path) -> None:
    """After one step with and without the earlier moments, what differs is exactly their part, cut like the weights."""
    method = ["prune.method=fisher", "prune.warmup_steps=1", "train.steps=4", "prune.calibration_batches=1"]
    train(world, tmp_path / "prune", *method, "optimizer.schedule={steps: 9}", "optimizer.warmup_steps=2")
    assert cli.main(["extract", str(tmp_path / "prune"), str(tmp_path / "small")]) == 0
    after = [f"model={tmp_path}/small", "prune=null", "train.steps=1", "optimizer.warmup_steps=2"]
    moments = f"optimizer.moments={tmp_path}/prune"
    schedule = "optimizer.schedule={steps: 9, before: 4}"
    train(world, tmp_path / "fresh", *after)
    train(world, tmp_path / "warm", *after, moments, schedule)
    run(2, on_ranks, str(world / "prune.yaml"), [f"run={tmp_path}/ranks", *after, moments, schedule, "parallel.tp=2"])

    pruned, fresh, warm, ranks = (final_state(tmp_path / name) for name in ("prune", "fresh", "warm", "ranks"))
    kept = {kind: (pruned[f"scores.{kind}"] >= 0) for kind in ("hidden", "layers", "heads_per_group", "ffn")}
    layer = int(kept["layers"].nonzero()[0])
    hidden, ffn = kept["hidden"].nonzero().flatten(), kept["ffn"][layer].nonzero().flatten()
    for moment, decay in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
        cut = pruned[f"adam.layers.{layer}.gate.{moment}"][ffn][:, hidden]
        assert cut.abs().max() > 0
        name = f"adam.layers.0.gate.{moment}"
        torch.testing.assert_close(warm[name] - fresh[name], decay * cut, rtol=1e-4, atol=1e-9)
    for name in warm:
        torch.testing.assert_close(ranks[name], warm[name], rtol=1e-3, atol=2e-5)
    progress = sharded.progress(sharded.latest(tmp_path / "warm") or tmp_path)
    assert progress.state["updates_before"] == 4
    assert not (tmp_path / "warm" / "moments").exists()
    rates = [line["learning_rate"] for name in ("prune", "warm") for line in metrics.read(tmp_path / name)]
    assert rates == pytest.approx([1e-3 * learning_rate_factor(step, 9, 2, 0.1) for step in range(5)])


def test_moments_of_another_run_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(world, tmp_path / "run", "prune.warmup_steps=1", "train.steps=2")
    for overrides, message in (
        (["prune=null", f"optimizer.moments={tmp_path}/run"], "give the run that made it"),
        (["prune=null", f"optimizer.moments={tmp_path}/no"], "is no run folder"),
        (["optimizer.schedule={steps: 9}"], "use at least 14"),
    ):
        assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/other", *overrides]) == 2
        assert message in capsys.readouterr().err


def on_ranks(config: str, overrides: list[str]) -> None:
    """What torchrun does: the same command on every rank (which has joined the process group already)."""
    as_under_torchrun()
    assert cli.main(["train", config, "data.update_every=0", *overrides]) == 0


def test_training_without_steps_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, message in (
        (["prune=null"], "train.steps=0 is for choosing units"),
        ([], "end before the target sparsity is reached"),
    ):
        config = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", "train.steps=0", *overrides]
        assert cli.main(config) == 2
        assert message in capsys.readouterr().err


def test_a_rotated_run_is_the_same_in_every_layout_and_extracts_what_it_measured(world: Path, tmp_path: Path) -> None:
    settings = ["prune.method=fisher", "prune.rotate=true", "prune.warmup_steps=2", "train.steps=3"]
    settings += ["prune.calibration_batches=3", "prune.target.hidden=32"]
    train(world, tmp_path / "alone", *settings)
    for name, ranks, layout in (("tp2", 2, ["parallel.tp=2"]), ("pp2 x fsdp2", 4, ["parallel.pp=2"])):
        run(ranks, on_ranks, str(world / "prune.yaml"), [f"run={tmp_path}/{name}", *settings, *layout])
        for before, after in zip(metrics.read(tmp_path / "alone"), metrics.read(tmp_path / name), strict=True):
            assert after["loss"] == pytest.approx(before["loss"], abs=2e-4)
    alone, other = final_state(tmp_path / "alone"), final_state(tmp_path / "pp2 x fsdp2")
    energy = alone["rotation.energy"]
    assert (energy[:-1] >= energy[1:]).all()
    torch.testing.assert_close(energy.sum(), torch.tensor(9.0 * 48), rtol=1e-3, atol=0)  # of 2 x 4 + 1 norms
    torch.testing.assert_close(other["rotation.energy"], energy, rtol=1e-3, atol=1e-4)
    assert (alone["scores.hidden"][:32] >= 0).all()
    assert cli.main(["extract", str(tmp_path / "alone"), str(tmp_path / "small")]) == 0
    assert not read_architecture(tmp_path / "small").shape.tied
    measured = ["prune=null", "train.steps=1", "optimizer.learning_rate=1e-12", f"model={tmp_path}/small"]
    train(world, tmp_path / "measure", *measured)
    cut, dense = (metrics.read(tmp_path / name)[-1]["held_out"] for name in ("alone", "measure"))
    assert dense == pytest.approx(cut, abs=1e-4)


def test_rotating_alone_changes_no_loss(world: Path, tmp_path: Path) -> None:
    """The first step's loss, before units close, is that of a run that does not rotate."""
    settings = ["prune.method=fisher", "prune.warmup_steps=2", "train.steps=2", "prune.calibration_batches=2"]
    train(world, tmp_path / "plain", *settings, "prune.calibration_batches=4")  # as many batches are used up before
    train(world, tmp_path / "turned", *settings, "prune.rotate=true")
    plain, turned = (metrics.read(tmp_path / name)[0]["loss"] for name in ("plain", "turned"))
    assert turned == pytest.approx(plain, abs=1e-5)


def test_rotation_that_makes_no_sense_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for overrides, message in (
        (["prune.rotate=true"], "hard_concrete learns it"),
        (["prune.rotate=true", "prune.method=random", "prune.target.hidden=48"], "the target keeps all 48"),
    ):
        assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/other", *overrides]) == 2
        assert message in capsys.readouterr().err


def test_a_run_learns_from_a_teacher_alike_in_every_layout(world: Path, tmp_path: Path) -> None:
    settings = [f"distill.teacher={world}/model", "distill.alpha=0.7", "prune.method=fisher", "prune.warmup_steps=2"]
    settings += ["train.steps=4", "prune.calibration_batches=1", "checkpoint.every=2"]
    train(world, tmp_path / "alone", *settings)
    lines = metrics.read(tmp_path / "alone")
    assert lines[0]["divergence"] == pytest.approx(0, abs=1e-6)  # the source, all units open, is its own teacher
    assert lines[2]["divergence"] > 1e-4
    run(4, on_ranks, str(world / "prune.yaml"), [f"run={tmp_path}/ranks", *settings, "parallel.tp=2", "parallel.pp=2"])
    for before, after in zip(lines, metrics.read(tmp_path / "ranks"), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=2e-4)
        assert after["divergence"] == pytest.approx(before["divergence"], abs=2e-4)
    train(world, tmp_path / "plain", *settings[2:])
    plain = metrics.read(tmp_path / "plain")
    assert plain[0]["loss"] == pytest.approx(lines[0]["loss"], rel=2**-23)  # float32, by another op: its last bit
    assert plain[-1]["loss"] != lines[-1]["loss"]
    assert "divergence" not in plain[0]
    assert lines[0]["flops"] == pytest.approx(plain[0]["flops"] * 4 / 3, rel=1e-6)  # one forward more


def test_a_cached_teacher_teaches_alike_in_every_layout_and_need_not_be_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all words as samples a run is what it is with its teacher; filled on four ranks, interrupted before."""
    shutil.copytree(world / "model", tmp_path / "teacher")
    taught = [f"distill.teacher={tmp_path}/teacher", "distill.alpha=0.7", "distill.temperature=2.0"]
    cached = [*taught, f"distill.cache={tmp_path}/cache", "distill.samples=320"]
    settings = ["prune.method=fisher", "prune.warmup_steps=2", "train.steps=4", "prune.calibration_batches=1"]
    config = [str(world / "prune.yaml"), f"run={tmp_path}/cached", "data.update_every=0", *settings]
    train(world, tmp_path / "online", *settings, *taught)
    assert cli.main(["train", *config, *cached]) == 2
    assert "fill it with `shear-tron cache-teacher" in capsys.readouterr().err

    monkeypatch.setattr(cache, "FILE_BYTES", 3 * 16 * (320 * 4 + 4))  # three windows a file
    add = cache.Writer.add

    def until(self: cache.Writer, *given: Any) -> None:
        if len(list(self.folder.glob("*.safetensors"))) == 2:
            raise ValueError("the power went out")
        add(self, *given)

    monkeypatch.setattr(cache.Writer, "add", until)
    assert cli.main(["cache-teacher", *config, *cached]) == 1
    monkeypatch.setattr(cache.Writer, "add", add)
    first = cache.Cache(tmp_path / "cache").files()
    assert cli.main(["train", *config, *cached]) == 2
    assert "windows that this run draws" in capsys.readouterr().err
    run(4, fill_and_train_on_ranks, [*config, *cached], f"run={tmp_path}/ranks")
    assert set(first) < set(cache.Cache(tmp_path / "cache").files())
    shutil.rmtree(tmp_path / "teacher")
    assert cli.main(["show", *config, *cached]) == 0
    assert "320 samples per token, 1284 bytes" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "cache")]) == 0

    train(world, tmp_path / "cached", *settings, *cached)
    for name in ("cached", "ranks"):
        for before, after in zip(metrics.read(tmp_path / "online"), metrics.read(tmp_path / name), strict=True):
            assert after["loss"] == pytest.approx(before["loss"], abs=2e-4)
            assert after["divergence"] == pytest.approx(before["divergence"], abs=2e-3)
    assert after["flops"] < before["flops"]

    for overrides, message in (
        (["train.steps=40"], "windows that this run draws"),
        (["distill.temperature=1.0"], "was filled with temperature=2.0, and this run has 1.0"),
        (["distill.samples=8"], "was filled with samples=320"),
    ):
        assert cli.main(["train", *config, *cached, f"run={tmp_path}/other", *overrides]) == 2
        assert message in capsys.readouterr().err
    damaged = first[0].read_bytes()
    first[0].write_bytes(damaged[:-1])
    assert cli.main(["verify", str(tmp_path / "cache")]) == 2
    assert "is damaged" in capsys.readouterr().err


def fill_and_train_on_ranks(arguments: list[str], run: str) -> None:
    as_under_torchrun()
    assert cli.main(["cache-teacher", *arguments, "parallel.tp=2", "parallel.pp=2"]) == 0
    assert cli.main(["train", *arguments, run, "parallel.pp=2"]) == 0


def test_a_teacher_that_does_not_fit_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for change, message in (
        ({"vocab_size": 64}, "has vocab=64, the model 320"),
        ({"max_position_embeddings": 8}, "longer than the teacher's context=8"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
        arguments = ["train", str(world / "prune.yaml"), f"run={tmp_path}/run", f"distill.teacher={tmp_path}/model"]
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
