"""A small real subject for experiments on two cores: six domains of text, and a LLaMA trained on them from nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from shear_tron.shape import Shape

EXAMPLES = Path(__file__).parents[1]
SEQUENCE = 128


def run(*command: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True)


def write(file: Path, values: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(values))
    return file


def training(out: Path, name: str, model: Path, steps: int, batch: int, rate: float, **data: Any) -> dict[str, Any]:
    """Settings of a training run in ``out/name``; ``data`` overrides that section's."""
    return {
        "run": str(out / name),
        "model": str(model),
        "data": {"folder": str(out / "tokens"), "sequence": SEQUENCE, "evaluate_windows": 64, **data},
        "train": {
            "steps": steps,
            "batch": batch,
            "micro_batch": batch,
        },
        "optimizer": {"learning_rate": rate, "warmup_steps": steps // 20},
    }


def trained_source(out: Path, shape: Shape, steps: int, batch: int) -> Path:
    """``out/source``, a model of ``shape`` trained on the tokens of ``out/tokens``. What is made already is kept."""
    text, random, trained = out / "text", out / "random", out / "source"
    out.mkdir(parents=True, exist_ok=True)
    run(EXAMPLES / "smollm2" / "fetch_text.py", text)
    if not random.exists():
        _random_model(random, shape)
        _tokenizer(random, text, shape.vocab)
    domains = {file.stem: {"path": str(file), "held_out": 0.1, "cut": 8000} for file in sorted(text.glob("*.jsonl"))}
    settings = {
        "output": str(out / "tokens"),
        "tokenizer": str(random),
        "domains": domains,
        "separator": "<|endoftext|>",
    }
    run("-m", "shear_tron", "prepare", write(out / "prepare.yaml", settings))
    if not trained.exists():
        values = training(out, "train", random, steps, batch, 2e-3)
        run("-m", "shear_tron", "train", write(out / "source.yaml", values))
        run("-m", "shear_tron", "export", out / "train", trained)
    return trained


def _tokenizer(folder: Path, text: Path, vocab: int) -> None:
    """A byte-level BPE over all domains."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def documents() -> Any:
        for file in sorted(text.glob("*.jsonl")):
            for line in file.open():
                yield json.loads(line)["text"]

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(documents(), trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<|endoftext|>"]))
    made.save(str(folder / "tokenizer.json"))


def _random_model(folder: Path, shape: Shape) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate_size=shape.ffn, max_position_embeddings=SEQUENCE, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
