"""A model and data that nobody trained or wrote: what a run needs, made in a second without the data tools."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import write
from shear_tron.data.manifest import Domain, Manifest, Shard, fingerprint
from shear_tron.params import params
from shear_tron.shape import Shape


def model(folder: Path, shape: Shape, context: int) -> None:
    """Random weights, and a tokenizer whose words are numbers."""
    words = folder.with_name("tokenizer")
    words.mkdir(parents=True, exist_ok=True)
    vocab = {str(number): number for number in range(shape.vocab)}
    Tokenizer(models.WordLevel(vocab, unk_token="0")).save(str(words / "tokenizer.json"))
    (words / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "0"}')
    generator = torch.Generator().manual_seed(0)
    architecture = Architecture(shape, context=context)
    weights = (
        (
            each.name,
            torch.ones(each.size) if "norm" in each.name else torch.randn(each.size, generator=generator) * 0.02,
        )
        for each in params(architecture)
    )
    write(folder, architecture, weights, tokenizer_from=words)


def data(folder: Path, model: Path, vocab: int, tokens: int) -> None:
    """Two domains of counting up, by one and by two, which a small model learns at once."""
    draw = np.random.default_rng(0)
    domains = {}
    for step, name in ((1, "ones"), (2, "twos")):
        shards = {}
        for split, share in (("train", 1.0), ("held_out", 0.1)):
            starts = draw.integers(vocab, size=max(2, int(tokens * share) // 32))
            ids = ((starts[:, None] + step * np.arange(32)) % vocab).astype("<u2").ravel()
            file = f"{name}-{split}.ds"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(ids.tobytes())
            (folder / f"{file}.index").write_bytes(np.arange(32, len(ids) + 1, 32, dtype="<u8").tobytes())
            shards[split] = (Shard(file, len(ids), len(ids) // 32, "0" * 64, "0" * 64),)
        domains[name] = Domain(shards["train"], shards["held_out"])
    Manifest(str(folder), str(model), fingerprint(str(model)), vocab, 2, None, 0, 0.1, domains).write()
