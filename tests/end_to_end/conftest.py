"""A tiny model with its tokenizer and three prepared domains, made once."""

import random
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import write
from shear_tron.data.prepare import DomainSource, PrepareConfig, prepare
from shear_tron.params import params
from shear_tron.shape import Shape

SHAPE = Shape(hidden=48, layers=4, heads=12, kv_heads=4, head_dim=8, ffn=64, vocab=320)
TARGET = {"hidden": 32, "layers": 2, "heads": 8, "kv_heads": 4, "ffn": 32}
WORDS = {
    "colours": "red orange yellow green blue indigo violet",
    "numbers": "one two three four five six seven eight nine ten",
    "trees": "oak ash elm birch maple willow cedar pine",
}


def write_text(folder: Path) -> None:
    draw = random.Random(0)
    folder.mkdir()
    for name, words in WORDS.items():
        choices = words.split()
        documents = [" ".join(draw.choice(choices) for _ in range(60)) for _ in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS.values())] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}'
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(folder: Path) -> Path:
    """A folder with ``model`` (Hugging Face), ``data`` (prepared) and ``prune.yaml``, paths absolute."""
    write_text(folder / "text")
    write_tokenizer(folder / "tokenizer")
    generator = torch.Generator().manual_seed(0)

    def value(name: str, size: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(size)
        return torch.randn(size, generator=generator) * 0.05

    write(
        folder / "model",
        Architecture(SHAPE, context=64),
        ((param.name, value(param.name, param.size)) for param in params(Architecture(SHAPE))),
        tokenizer_from=folder / "tokenizer",
    )
    prepare(
        PrepareConfig(
            output=str(folder / "data"),
            tokenizer=str(folder / "model"),
            domains={name: DomainSource(path=str(folder / "text" / f"{name}.jsonl")) for name in WORDS},
            held_out=0.1,
            workers=1,
        )
    )
    config = {
        "run": str(folder / "prune"),
        "model": str(folder / "model"),
        "data": {
            "folder": str(folder / "data"),
            "sequence": 16,
            "update_every": 4,
            "reference_losses": "source",
            "evaluate_windows": 6,
        },
        "train": {"steps": 14, "batch": 8, "micro_batch": 1},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": 5},
        "prune": {"target": TARGET, "warmup_steps": 6},
    }
    (folder / "prune.yaml").write_text(yaml.safe_dump(config))
    return folder
