"""LLaMA 2's way with text, whole: a SentencePiece model, raw text, training, an export that spells the same."""

import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from shear_tron import cli
from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import write
from shear_tron.data.manifest import Manifest
from shear_tron.params import params
from shear_tron.shape import Shape

WORDS = ["red orange yellow green blue", "one two three four five six", "oak ash elm birch maple they'll"]
# Digits, runs of white space, and what only bytes can spell.
HARD = ["12 345 orange 6", "red  orange\n\ngreen\tblue   ", "Ä oak 東 elm", "onetwothree they'll"]


def llama2(folder: Path) -> int:
    """``tokenizer.model`` in the manner of LLaMA 2, and nothing that says it otherwise. Returns its size."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    return int(sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size())


def test_from_raw_text_to_an_export_that_spells_the_same(tmp_path: Path) -> None:
    vocab = llama2(tmp_path / "words")
    architecture = Architecture(Shape(hidden=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=16, vocab=vocab))
    noise = torch.Generator().manual_seed(0)
    tensors = [(p.name, 0.1 * torch.randn(p.size, generator=noise)) for p in params(architecture)]
    write(tmp_path / "model", architecture, tensors, tokenizer_from=tmp_path / "words")

    texts = [*HARD, *(f"{line} {line[i:]}" for line in WORDS for i in range(8))]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "output": f"{tmp_path}/data", "tokenizer": f"{tmp_path}/model", "bos": True, "held_out": 0.3, "workers": 1,
        "domains": {"words": {"path": f"{tmp_path}/text"}},
    }  # fmt: skip
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["prepare", str(tmp_path / "prepare.yaml")]) == 0
    run = {
        "run": f"{tmp_path}/run", "model": f"{tmp_path}/model", "data": {"folder": f"{tmp_path}/data", "sequence": 16},
        "train": {"steps": 1, "batch": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == vocab
    spelled = {(*tokenizer(text).input_ids, tokenizer.eos_token_id) for text in texts}
    manifest, found = Manifest.read(str(tmp_path / "data")), set()
    domain = manifest.domain("words")
    for shard in (*domain.train, *domain.held_out):
        ids = np.fromfile(tmp_path / "data" / shard.file, dtype="<u2").tolist()
        ends = np.fromfile(tmp_path / "data" / f"{shard.file}.index", dtype="<u8").tolist()
        found |= {tuple(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)}
    assert found == spelled
