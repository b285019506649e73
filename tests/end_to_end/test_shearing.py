"""The main job on a tiny model: prune, extract, continue, export, open with transformers; on one rank and on many."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from runs import as_under_torchrun, final_state

from shear_tron import cli
from shear_tron.checkpoint import sharded
from shear_tron.train import metrics


def train(config: Path, *overrides: str, status: int = 0) -> None:
    assert cli.main(["train", str(config), *overrides]) == status


def on_ranks(config: str, overrides: list[str], status: int = 0) -> None:
    """What torchrun does: the same command on every rank (which has joined the process group already)."""
    as_under_torchrun()
    train(Path(config), *overrides, status=status)


@pytest.fixture(scope="module")
def pruned(world: Path) -> Path:
    train(world / "prune.yaml")
    return world / "prune"


def test_a_model_is_pruned_extracted_continued_and_exported(pruned: Path, world: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    lines = metrics.read(pruned)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["expected_sparsity"] > 0.05
    assert any(line["weights"] != lines[0]["weights"] for line in lines)
    before = metrics.start(pruned)
    assert before is not None
    assert before["held_out"] == metrics.read_references(pruned)
    assert (before["step"], before["tokens"], before["weights"]) == (0, 0, lines[0]["weights"])
    assert [line["tokens"] for line in lines] == [step * 8 * 16 for step in range(1, 15)]
    assert [line["step"] for line in metrics.read_gates(pruned)] == list(range(1, 15))

    assert cli.main(["extract", str(pruned), str(tmp_path / "small")]) == 0
    continued = [f"run={tmp_path}/continued", f"model={tmp_path}/small", "prune=null", "train.steps=3"]
    train(world / "prune.yaml", *continued)
    assert cli.main(["export", f"{tmp_path}/continued", f"{tmp_path}/final"]) == 0

    small = LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert (small.config.hidden_size, small.config.num_hidden_layers) == (32, 2)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (8, 4)
    text = "red orange yellow"
    ids = AutoTokenizer.from_pretrained(tmp_path / "final")(text, return_tensors="pt").input_ids
    assert AutoTokenizer.from_pretrained(world / "model").decode(ids[0]) == text
    # the training's own final held-out losses are the exported model's, computed by transformers
    from shear_tron.data.manifest import Manifest
    from shear_tron.data.sampler import held_out

    reported = metrics.read(tmp_path / "continued")[-1]["held_out"]
    for name, loss in reported.items():
        windows = held_out(Manifest.read(str(world / "data")), name, 16, 6)
        with torch.no_grad():
            logits = small(windows[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        assert loss == pytest.approx(expected.item(), abs=1e-5)


def test_continued_training_starts_from_the_final_mixture_of_the_pruning_run(
    pruned: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the paper (section 2.2). A run that has not ended, or has no checkpoint, has no final mixture."""
    checkpoint = sharded.latest(pruned)
    assert checkpoint is not None
    final = sharded.progress(checkpoint).state["mixture"]["weights"]
    assert final != pytest.approx(dict.fromkeys(final, 1 / 3), abs=1e-3)  # it moved, or this would show nothing
    continued = [f"run={tmp_path}/continued", "prune=null", "train.steps=1"]
    train(world / "prune.yaml", *continued, f"data.weights={pruned}")
    assert metrics.read(tmp_path / "continued")[0]["weights"] == pytest.approx(final, rel=1e-12)

    shutil.copytree(pruned, tmp_path / "stopped", ignore=shutil.ignore_patterns(checkpoint.name))
    (tmp_path / "empty").mkdir()
    for folder, message in (("stopped", "stopped at step 10 of 14"), ("empty", "holds no run with a checkpoint")):
        weights = [f"run={tmp_path}/other", f"data.weights={tmp_path}/{folder}"]
        assert cli.main(["train", str(world / "prune.yaml"), *weights]) == 2
        assert message in capsys.readouterr().err


def test_what_pruning_has_read_does_not_come_again(
    pruned: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `data.after` a run's samples, and those that a cache of its teacher is filled with, are the next ones."""
    from shear_tron.config import load
    from shear_tron.data.manifest import Manifest
    from shear_tron.data.sampler import Sampler
    from shear_tron.train.config import RunConfig
    from shear_tron.train.drawn import drawn

    after = [f"run={tmp_path}/continued", "prune=null", "train.steps=2", "data.update_every=0", f"data.after={pruned}"]
    train(world / "prune.yaml", *after)
    saved = [sharded.latest(folder) for folder in (pruned, tmp_path / "continued")]
    ended, continued = (sharded.progress(folder).state for folder in saved if folder)
    manifest, config = Manifest.read(str(world / "data")), load(RunConfig, tmp_path / "continued" / "config.yaml")
    mixture = continued["mixture"]["weights"]
    sampler = Sampler(manifest, list(mixture), 16, config.train.seed)
    sampler.restore(ended["sampler"])
    draw = sampler.draw(2 * 8, list(mixture.values()))
    assert sampler.state() == continued["sampler"]
    assert ended["sampler"]["number"] > 0
    for place, (name, windows) in enumerate(drawn(config, manifest, mixture).items()):
        assert set(windows.tolist()) == set(draw.window[draw.domain == place].tolist()), name

    for given, message in (
        ("train.seed=7", f"data.after={pruned}: the sampler's saved seed="),
        ("data.sequence=8", f"data.after={pruned}: the sampler's saved sequence=16 is not this run's 8"),
        (f"data.after={tmp_path}", f"data.after={tmp_path} holds no run with a checkpoint"),
    ):
        assert cli.main(["train", str(world / "prune.yaml"), *after, f"run={tmp_path}/other", given]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_extracting_changes_nothing(pruned: Path, world: Path, tmp_path: Path) -> None:
    """The dense model's held-out loss is the masked model's, as the pruning run measured it."""
    assert cli.main(["extract", str(pruned), str(tmp_path / "small")]) == 0
    measured = ["prune=null", "train.steps=1", "data.update_every=0"]
    train(world / "prune.yaml", f"run={tmp_path}/measure", f"model={tmp_path}/small", *measured)
    masked, dense = metrics.read(pruned)[-1], metrics.start(tmp_path / "measure")
    assert dense is not None
    assert dense["held_out"] == pytest.approx(masked["held_out"], abs=1e-5)


@pytest.mark.parametrize("stopped_at", [5, 10])
def test_interrupted_and_resumed_is_never_interrupted_to_the_bit(
    pruned: Path, world: Path, tmp_path: Path, stopped_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shear_tron.train.loop import Trainer

    update = Trainer._update

    def until(self: Trainer, batches: Any) -> dict[str, Any]:
        if self.step == stopped_at + 1:  # a step after the checkpoint: it must be undone
            raise ValueError("the power went out")
        return update(self, batches)

    monkeypatch.setattr(Trainer, "_update", until)
    assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/run"]) == 1
    monkeypatch.undo()
    train(world / "prune.yaml", f"run={tmp_path}/run")
    never, resumed = final_state(pruned), final_state(tmp_path / "run")
    assert never.keys() == resumed.keys()
    for name in never:
        assert torch.equal(never[name], resumed[name]), name
    never_told, told = metrics.read(pruned), metrics.read(tmp_path / "run")
    assert [without_timing(line) for line in told] == [without_timing(line) for line in never_told]
    assert metrics.read_gates(tmp_path / "run") == metrics.read_gates(pruned)
    assert [record["from_step"] for record in metrics.headers(tmp_path / "run")] == [0, stopped_at]


def without_timing(line: dict[str, Any]) -> dict[str, Any]:
    timing = ("seconds", "data_seconds", "seconds_to_dense", "tokens_per_second", "tflops_per_rank")
    return {key: value for key, value in line.items() if key not in (*timing, "peak_memory", "time")}


LAYOUTS = {
    "dp2": (2, ["parallel.shard=1"]),
    "fsdp2": (2, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2 x tp2": (4, ["parallel.tp=2"]),
    "all on 8": (8, ["parallel.tp=2", "parallel.pp=2", "parallel.shard=2"]),
}


@pytest.mark.parametrize(("ranks", "overrides"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_trains_the_same_run(
    pruned: Path, world: Path, tmp_path: Path, ranks: int, overrides: list[str]
) -> None:
    run(ranks, on_ranks, str(world / "prune.yaml"), [f"run={tmp_path}/run", *overrides])
    alone, together = metrics.read(pruned), metrics.read(tmp_path / "run")
    for before, after in zip(alone, together, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=2e-4)
        assert after["weights"] == pytest.approx(before["weights"], abs=1e-4)
        assert after.get("held_out") == pytest.approx(before.get("held_out"), abs=2e-4)


@pytest.mark.parametrize(("first", "second"), [("pp2", "tp2"), ("dp2 x tp2", "pp2"), ("fsdp2", "all on 8")])
def test_a_checkpoint_of_one_layout_goes_on_in_another(
    pruned: Path, world: Path, tmp_path: Path, first: str, second: str
) -> None:
    """Halfway in one layout, the other half in another: the run is the one that never stopped, up to rounding."""
    for layout, steps in ((first, 10), (second, 14)):
        ranks, overrides = LAYOUTS[layout]
        checkpoints = ["checkpoint.every=10"]
        run(ranks, stop_after, str(world / "prune.yaml"), steps, [f"run={tmp_path}/run", *checkpoints, *overrides])
    for before, after in zip(metrics.read(pruned), metrics.read(tmp_path / "run"), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=2e-4)


def stop_after(config: str, steps: int, overrides: list[str]) -> None:
    """Train until the checkpoint of step ``steps`` is written, then fail."""
    from shear_tron.train.loop import Trainer

    update = Trainer._update

    def until(self: Trainer, batches: Any) -> dict[str, Any]:
        if self.step == steps:
            raise ValueError("the power went out")
        return update(self, batches)

    Trainer._update = until  # type: ignore[method-assign]
    try:
        if steps < 14:
            on_ranks(config, overrides, status=1)
        else:
            on_ranks(config, overrides)
    finally:
        Trainer._update = update  # type: ignore[method-assign]


def test_compact_training_is_masked_training(pruned: Path, world: Path, tmp_path: Path) -> None:
    train(world / "prune.yaml", f"run={tmp_path}/run", "prune.compact=false")
    for compact, masked in zip(metrics.read(pruned), metrics.read(tmp_path / "run"), strict=True):
        assert masked["loss"] == pytest.approx(compact["loss"], abs=2e-4)
        assert masked["expected_sparsity"] == pytest.approx(compact["expected_sparsity"], abs=1e-4)


def test_document_masking_changes_what_a_window_is(pruned: Path, world: Path, tmp_path: Path) -> None:
    train(world / "prune.yaml", f"run={tmp_path}/run", "data.document_masking=true", "train.steps=7")
    packed, masked = metrics.read(pruned)[0], metrics.read(tmp_path / "run")[0]
    assert masked["loss"] == pytest.approx(packed["loss"], abs=0.05)
    assert masked["loss"] != packed["loss"]


def test_a_damaged_checkpoint_is_refused_in_one_line(
    pruned: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pruned, tmp_path / "run")
    checkpoint = sharded.latest(tmp_path / "run")
    assert checkpoint is not None
    next(checkpoint.glob("*.safetensors")).unlink()
    assert cli.main(["train", str(world / "prune.yaml"), f"run={tmp_path}/run"]) == 2
    assert "is missing; the checkpoint is damaged" in capsys.readouterr().err
