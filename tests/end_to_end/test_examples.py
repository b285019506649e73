"""The examples that use other people's programs on a model of ours, run for real on a tiny one."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from shear_tron import cli
from shear_tron.checkpoint.model_folder import read_architecture

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = [
    {"from": "system", "value": "colours only"},
    {"from": "human", "value": "red orange"},
    {"from": "gpt", "value": "yellow green"},
    {"from": "human", "value": "blue"},
    {"from": "gpt", "value": "indigo violet"},
]


def load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, EXAMPLES / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sft() -> ModuleType:
    pytest.importorskip("trl", reason="trl is not installed; pip install '.[instruct]'")
    return load("instruct/sft.py")


def test_only_answers_have_a_loss(sft: ModuleType, world: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "talk.jsonl").write_text(json.dumps({"conversations": SAID}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = sft.TEMPLATE
    encoded = sft.encode(tokenizer, sft.read(tmp_path / "talk.jsonl")[0], 1000)
    assert len(encoded["input_ids"]) == len(encoded["labels"])
    learned = [label for label in encoded["labels"] if label != sft.IGNORED]
    assert tokenizer.decode(learned) == "yellow green<end>\nindigo violet<end>\n"
    whole = "### System:\ncolours only\n### User:\nred orange\n### Answer:\nyellow green<end>\n"
    assert tokenizer.decode(encoded["input_ids"]).startswith(whole)
    (tmp_path / "talk.jsonl").write_text('{"conversations": [{"from": "robot", "value": ""}]}\n')
    with pytest.raises(ValueError, match=r"talk.jsonl:1 is no ShareGPT conversation \(KeyError\('robot'\)\)"):
        sft.read(tmp_path / "talk.jsonl")


@pytest.mark.rehearsal
def test_a_model_learns_an_answer(
    sft: ModuleType, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few real steps of TRL; afterwards the model answers in its template, and is an export like any other."""
    (tmp_path / "talk.jsonl").write_text((json.dumps({"conversations": SAID[1:3]}) + "\n") * 8)
    torch.manual_seed(0)
    sft.tune(
        str(world / "model"),
        str(tmp_path / "talk.jsonl"),
        str(tmp_path / "chat"),
        length=48,
        max_steps=60,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
    )
    capsys.readouterr()
    asked = ["generate", str(tmp_path / "chat"), "red orange", "--chat", "--tokens", "12"]
    assert cli.main(asked) == 0
    assert capsys.readouterr().out.startswith("yellow green")


def test_the_harness_runs_a_task_of_a_local_file(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its accuracy is the share of questions whose right choice the model finds likelier, by transformers alone."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install '.[evaluate]'")
    from transformers import AutoTokenizer, LlamaForCausalLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = [
        ("red orange", "yellow", "nine"),
        ("one two", "oak", "three"),
        ("elm birch", "maple", "ten"),
        ("a", "b", "c"),
    ]
    lines = [{"query": query, "choices": [first, second], "gold": 0} for query, first, second in asked]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "colours.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/colours.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "run.yaml").write_text("- {task: colours, shots: 0}\n")
    options = ["--tasks", f"{tmp_path}/run.yaml", "--include", f"{tmp_path}/tasks", "--batch", "1"]
    load("evaluate/run.py").main([str(world / "model"), *options, "--json", f"{tmp_path}/found.json"])
    found = json.loads((tmp_path / "found.json").read_text())[str(world / "model")]["colours"]["acc,none"]
    assert f"{found:.4f}" in capsys.readouterr().out

    model, tokenizer = LlamaForCausalLM.from_pretrained(world / "model"), AutoTokenizer.from_pretrained(world / "model")

    def likelihood(query: str, choice: str) -> float:
        before, whole = tokenizer(query).input_ids, tokenizer(f"{query} {choice}").input_ids
        with torch.no_grad():
            chances = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(chances[place - 1, whole[place]]) for place in range(len(before), len(whole)))

    right = [likelihood(query, first) > likelihood(query, second) for query, first, second in asked]
    assert found == pytest.approx(sum(right) / len(right))


def test_the_paper_has_eleven_tasks() -> None:
    tasks = yaml.safe_load((EXAMPLES / "evaluate/paper.yaml").read_text())
    assert len({task["task"] for task in tasks}) == len(tasks) == 11


def test_source_sheared_and_uneven_models_generate(world: Path, tmp_path: Path) -> None:
    """All weights random; the uneven one has the sheared one's parameters in layers of different sizes."""
    inference = load("inference/run.py")
    options = ["--target", "layers=3,ffn=32", "--tokens", "2", "--prompt", "4", "--rounds", "1", "--no-llama-cpp"]
    inference.main([str(world / "model"), *options, "--rows", str(tmp_path / "rows.csv")])
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["model"] for row in rows] == ["source", "sheared", "uneven"]
    assert int(rows[0]["parameters"]) > int(rows[1]["parameters"]) == int(rows[2]["parameters"])
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)
    architecture = read_architecture(world / "model")
    groups, ffn = zip(*inference.uneven_sizes(architecture), strict=True)
    assert len(set(groups)) > 1 < len(set(ffn))
    assert (sum(groups), sum(ffn)) == (4 * architecture.shape.kv_heads, 4 * architecture.shape.ffn)


@pytest.mark.rehearsal
def test_the_benchmark_of_formats_converts_each_way(tmp_path: Path) -> None:
    """Weights are holes; that what is written is right is other tests' business."""
    script = [
        sys.executable,
        str(EXAMPLES / "benchmarks/formats.py"),
        str(tmp_path / "out"),
        "--rows",
        str(tmp_path / "rows.csv"),
    ]
    subprocess.run([*script, "--shape", "tiny", "--sparse"], capture_output=True, check=True)
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(row["from"], row["to"], row["met"]) for row in rows] == [
        ("hf", "cp", ""),
        ("hf", "huggingface", "yes"),
        ("hf", "nanotron", "yes"),
        ("nanotron", "huggingface", "yes"),
        ("hf", "gguf", "yes"),
        ("run", "export", "yes"),
    ]
