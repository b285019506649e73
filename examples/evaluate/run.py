"""Runs lm-evaluation-harness on exported models: a table of tasks by models, and all of its numbers as JSON.

    pip install '.[evaluate]'
    python examples/evaluate/run.py models/small models/final --tasks examples/evaluate/paper.yaml --json found.json

The harness fetches its datasets from the Hugging Face Hub. Tasks of your own are its YAML files in a folder given as
--include; a task whose `dataset_path` is `json` with `data_files` on this machine needs no network.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

METRICS = ("acc_norm,none", "acc,none", "exact_match,remove_whitespace", "exact_match,none")  # the first that is there


def evaluate(
    models: Sequence[str], tasks: Sequence[dict[str, Any]], include: str | None, limit: int | None, batch: str | int
) -> dict[str, Any]:
    """{model: {task: the harness's results}}."""
    manager = TaskManager(include_path=include)
    found: dict[str, Any] = {}
    for model in models:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = HFLM(pretrained=model, batch_size=batch, dtype="auto", device=device)
        found[model] = {}
        for each in tasks:
            result = simple_evaluate(
                network, tasks=[each["task"]], num_fewshot=each["shots"], task_manager=manager, limit=limit
            )
            found[model][each["task"]] = result["results"][each["task"]]
    return found


def table(found: dict[str, Any]) -> str:
    models = list(found)
    width = max(len(task) for task in [*found[models[0]], "task"])
    lines = [f"{'task':{width}}  metric        " + "  ".join(f"{Path(model).name:>17}" for model in models)]
    for task in found[models[0]]:
        metric = next(metric for metric in METRICS if metric in found[models[0]][task])
        name, _, how = metric.partition(",")
        cells = [f"{found[m][task][metric]:.4f} ± {_error(found[m][task], name, how)}" for m in models]
        lines.append(f"{task:{width}}  {name:12}  " + "  ".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def _error(result: dict[str, Any], name: str, how: str) -> str:
    error = result.get(f"{name}_stderr,{how}")
    return f"{error:.4f}" if isinstance(error, float) else "?"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Hugging Face folders")
    parser.add_argument("--tasks", default=str(Path(__file__).with_name("paper.yaml")), help="YAML: task, shots")
    parser.add_argument("--include", help="folder with the harness's YAML of your own tasks")
    parser.add_argument("--limit", type=int, help="examples of each task")
    parser.add_argument("--batch", default="auto:4")
    parser.add_argument("--json", help="write all results there")
    given = parser.parse_args(argv)
    tasks = yaml.safe_load(Path(given.tasks).read_text())
    found = evaluate(given.models, tasks, given.include, given.limit, given.batch)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1, default=str) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
