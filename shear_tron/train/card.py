"""The README.md of an exported model: what it is, what it came from, what it was trained on, how to make it again."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface_config import TOKEN_IDS
from shear_tron.checkpoint.safetensors_stream import read_json
from shear_tron.data.manifest import FILE, Manifest
from shear_tron.hub import SCHEME, is_id
from shear_tron.params import count
from shear_tron.train import metrics
from shear_tron.train.run_folder import RunFolder

LINEAGE = "## Lineage"
CARD, GENERATION = "README.md", "generation_config.json"


def card(run: RunFolder, name: str, architecture: Architecture, source: Architecture, command: str) -> str:
    """The model card, from what the run logged up to its checkpoint and from its source's card.

    name: of the exported model. command: what exports it. Steps that the log does not have are left out, not guessed.
    """
    steps = [line for line in metrics.read(run.path) if line["step"] <= run.step] if _logged(run) else []
    pruned = run.config.prune is not None
    made = "Cut out of" if pruned else "Trained on from"
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["shear-tron", "pruned"]}
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---",
        f"# {name}",
        f"{count(architecture):,} parameters. {made} {_called(run)} with shear-tron (Sheared LLaMA, "
        f"arXiv:2310.06694).{' No training after the cut: continue its pre-training before use.' if pruned else ''}",
        "## Shape",
        _shapes(architecture, source if pruned else None),
        LINEAGE,
        "\n".join([*lineage(run.model), _this_step(run, architecture, source, steps, command)]),
        "## Data",
        _data(run, steps),
        "## Licence",
        _licence(run),
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```',
    ]
    return "\n\n".join(parts) + "\n"


def publish(run: RunFolder, folder: Path, text: str) -> None:
    """Put into an exported Hugging Face folder what others look for there: the card, licence files of the source, and
    generation_config.json, made of the special tokens where the source has none."""
    (folder / CARD).write_text(text, "utf-8")
    for pattern in ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"):
        for file in run.model.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    if not (folder / GENERATION).exists():
        config = read_json(folder / "config.json")
        tokens = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
        (folder / GENERATION).write_text(json.dumps({"_from_model_config": True, **tokens}, indent=2) + "\n")


def lineage(model: Path) -> list[str]:
    """What the card of ``model`` says it came from, if it is one of ours: a line for each run."""
    text = (model / CARD).read_text("utf-8", errors="replace") if (model / CARD).is_file() else ""
    _, found, after = text.partition(f"{LINEAGE}\n\n")
    return after.split("\n\n", 1)[0].splitlines() if found else []


def _logged(run: RunFolder) -> bool:
    return (run.path / metrics.LOG).exists()


def _called(run: RunFolder) -> str:
    """The source model's name: its Hub id, what its config.json calls it, or the folder's last part."""
    if is_id(run.config.model):
        return run.config.model.removeprefix(SCHEME)
    config = run.model / "config.json"
    given = read_json(config).get("_name_or_path") if config.exists() else None
    return str(given) if given and not Path(str(given)).is_absolute() else run.model.resolve().name


def _this_step(
    run: RunFolder,
    architecture: Architecture,
    source: Architecture,
    steps: Sequence[Mapping[str, Any]],
    command: str,
) -> str:
    start = metrics.headers(run.path)[-1:] if _logged(run) else []
    versions = ", ".join(
        f"shear-tron {each.get('versions', {}).get('shear-tron')}, commit {each.get('commit')}" for each in start
    )
    tokens = run.step * run.config.train.batch * run.config.data.sequence
    sizes = f"{count(source):,} parameters"
    if run.config.prune is not None:
        sizes += f" pruned to {count(architecture):,}"
    return (
        f"1. {_called(run)}: {sizes}, {run.step:,} steps, {tokens:,} tokens of {run.config.data.sequence:,} a sample "
        f"({versions or 'shear-tron'}); `{command}`"
    )


def _shapes(architecture: Architecture, source: Architecture | None) -> str:
    keys = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab")
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for title, each in (("source", source), ("this model", architecture)):
        if each is not None:
            values = [f"{getattr(each.shape, key):,}" for key in keys]
            lines.append(f"| {title} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _data(run: RunFolder, steps: Sequence[Mapping[str, Any]]) -> str:
    """Domains, their shares of the samples as the run went on, and the last held-out losses."""
    if not steps:
        return "The run's log is not there."
    places = sorted({0, len(steps) // 4, len(steps) // 2, 3 * len(steps) // 4, len(steps) - 1})
    shown = [steps[place] for place in places]
    nowhere: Mapping[str, Any] = {"step": 0, "held_out": {}}
    measured = next((line for line in reversed(steps) if "held_out" in line), nowhere)
    lines = [
        f"Share of samples by step, and held-out loss in nats per token, last measured at step {measured['step']:,}.",
        "",
        "| domain | " + " | ".join(f"step {line['step']:,}" for line in shown) + " | held-out loss |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for name in shown[0].get("weights", {}):
        shares = " | ".join(f"{line.get('weights', {}).get(name, 0):.3f}" for line in shown)
        loss = measured["held_out"].get(name)
        lines.append(f"| {name} | {shares} | {'-' if loss is None else f'{loss:.4f}'} |")
    return "\n".join(lines)


def _licence(run: RunFolder) -> str:
    lines = ["The licence of the first model under Lineage covers the weights; shear-tron adds no terms of its own."]
    if (run.data / FILE).exists():
        domains = Manifest.read(str(run.data), shards=False).domains  # which may be gone by now
        known = [f"{name}: {domain.licence}" for name, domain in domains.items() if domain.licence]
        lines += [f"Texts: {'; '.join(known)}."] if known else []
    return " ".join(re.sub(r"\s+", " ", line) for line in lines)
