"""A run's log: what was undone is dropped, and a line that is still being written is not there."""

from pathlib import Path

import pytest
import torch

from shear_tron.pruning.gates import Gates
from shear_tron.pruning.snapshot import snapshot
from shear_tron.report import story
from shear_tron.shape import Shape
from shear_tron.train import metrics
from shear_tron.train.metrics import GATES, LOG, Log


def write(run: Path, *lines: str) -> None:
    (run / LOG).write_text("\n".join(lines))


def test_a_line_that_is_being_written_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, '{"run": {"from_step": 0}}', '{"step": 1}', '{"step": 2, "lo')
    assert metrics.read(tmp_path) == [{"step": 1}]
    assert metrics.headers(tmp_path) == [{"from_step": 0}]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write(tmp_path, '{"step": 1, "lo', '{"step": 2}', "")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        metrics.read(tmp_path)


def test_a_resumed_log_forgets_what_was_undone(tmp_path: Path) -> None:
    write(tmp_path, '{"run": {"from_step": 0}}', '{"step": 1}', '{"step": 2}', '{"run": {"from_step": 2}}', '{"st')
    (tmp_path / GATES).write_text('{"step": 1, "ffn": []}\n{"step": 2, "ffn": []}\n')
    log = Log(tmp_path, 1, 9, "training", is_main=True)
    log.write({"step": 2, "loss": 0.5})
    log.close()
    assert metrics.headers(tmp_path) == [{"from_step": 0}]
    assert metrics.read(tmp_path) == [{"step": 1}, {"step": 2, "loss": 0.5}]
    assert [line["step"] for line in metrics.read_gates(tmp_path)] == [1]


def test_damaged_lines_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    """What is no step goes; a step stays even if a report would refuse it: nothing of a log is thrown away unasked."""
    damaged = ["[1]", "7", '"rewind"', '{"step": "x"}', '{"run": []}', "[" * 100_000, '{"step": 1e999}', '{"st']
    write(tmp_path, '{"step": 1, "loss": "of a later version"}', *damaged, '{"step": 2}', '{"step": 3}', "")
    Log(tmp_path, 2, 9, "training", is_main=True).close()
    assert (tmp_path / LOG).read_text() == '{"step": 1, "loss": "of a later version"}\n{"step": 2}\n'


def test_what_the_model_was_before_the_first_step_is_no_step_and_stays(tmp_path: Path) -> None:
    for loss in (3.0, 2.5):  # the second time after a stop that left no checkpoint
        log = Log(tmp_path, 0, 9, "training", is_main=True)
        log.tell_start({"step": 0, "tokens": 0, "weights": {"wiki": 1.0}, "held_out": {"wiki": loss}})
        log.write({"step": 1})
        log.close()
    Log(tmp_path, 1, 9, "training", is_main=True).close()
    assert metrics.read(tmp_path) == [{"step": 1}]
    assert metrics.start(tmp_path) == {"step": 0, "tokens": 0, "weights": {"wiki": 1.0}, "held_out": {"wiki": 2.5}}
    write(tmp_path, '{"step": 1}', "")
    assert metrics.start(tmp_path) is None


def test_a_snapshot_tells_means_of_blocks_by_layer() -> None:
    source = Shape(hidden=200, layers=3, heads=8, kv_heads=4, head_dim=8, ffn=32, vocab=64)
    gates = Gates(source, Shape(hidden=100, layers=3, heads=4, kv_heads=4, head_dim=8, ffn=16, vocab=64))
    for logits in gates.logits.values():
        torch.nn.init.normal_(logits)
    told, exact = snapshot(gates.expected()), dict(gates.expected().items())
    assert told.keys() == {"hidden", "heads_per_group", "ffn"}
    assert torch.tensor(told["ffn"]).shape == (3, 32)
    torch.testing.assert_close(torch.tensor(told["ffn"]), exact["ffn"].detach(), atol=6e-4, rtol=0)
    assert len(told["hidden"]) == 64
    # 200 = 8 blocks of 4 and 56 of 3, neighbours together
    assert told["hidden"][0] == pytest.approx(exact["hidden"][:4].mean().item(), abs=6e-4)
    assert told["hidden"][-1] == pytest.approx(exact["hidden"][-3:].mean().item(), abs=6e-4)


def test_a_report_asks_for_steps_where_none_was_made(tmp_path: Path) -> None:
    """Units chosen by train.steps=0 leave a line of losses, in a log that is whole."""
    write(tmp_path, '{"step": 0, "tokens": 0, "weights": {"a": 1.0}, "held_out": {"a": 3.0}}', "")
    with pytest.raises(ValueError, match=r"has not finished its first step .* train\.steps=0"):
        story.read([tmp_path], [])
