"""GGUF files: what transformers and llama.cpp read out of them is the model that went in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint import huggingface
from shear_tron.checkpoint.gguf import Kind, require, write
from shear_tron.params import params
from shear_tron.shape import Shape

LLAMA3 = Rope(theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
GROUPED = Shape(hidden=64, layers=2, heads=8, kv_heads=2, head_dim=16, ffn=96, vocab=300)
PLAIN = Shape(hidden=64, layers=2, heads=4, kv_heads=4, head_dim=16, ffn=96, vocab=300)
SQUARE = Shape(hidden=64, layers=2, heads=8, kv_heads=2, head_dim=8, ffn=96, vocab=300)  # hidden is whole heads
TIED = Shape(hidden=48, layers=5, heads=6, kv_heads=3, head_dim=8, ffn=80, vocab=300, tied=True)
QKV = frozenset({"q", "k", "v"})
MODELS = {
    "plain": Architecture(PLAIN, Rope(theta=50000.0), context=128),
    "grouped": Architecture(GROUPED, context=128),
    "tied": Architecture(TIED, context=128),
    "llama-3.1": Architecture(GROUPED, LLAMA3, context=128),
    "biases": Architecture(GROUPED, context=128, biases=QKV | {"o", "gate", "up", "down"}),
    "mistral": Architecture(GROUPED, context=128, family="mistral"),
    "qwen2": Architecture(SQUARE, context=128, family="qwen2", biases=QKV),
    "qwen3": Architecture(GROUPED, context=128, family="qwen3", qk_norm=True),
    "smollm3": Architecture(TIED, context=128, family="smollm3", unturned_layers=frozenset({3})),
    "gpt_neox": Architecture(
        PLAIN,
        Rope(share=0.25),
        context=128,
        family="gpt_neox",
        norm="layer",
        mlp="gelu",
        biases=QKV | {"o", "up", "down"},
        parallel_residual=True,
    ),
}
TEXT = "The 12 quick brown foxes don't jump; they'll\n\n  think. ÄÖ 東京 1234567"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def save_tokenizer(folder: Path, cut: Any = CUTS["gpt-2"]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT, "don't think they'll jump 12 123 1234"] * 9, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tensors(architecture: Architecture) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)
    return {
        p.name: 0.2 * torch.randn(p.size, generator=noise) + (1.0 if "norm" in p.name else 0.0)
        for p in params(architecture)
    }


def make(folder: Path, name: str, kind: Kind = "float32", cut: Any = CUTS["gpt-2"]) -> dict[str, Tensor]:
    """``folder/hf`` and ``folder/out/model.gguf`` of the same weights."""
    architecture = MODELS[name]
    weights = tensors(architecture)
    save_tokenizer(folder / "tokenizer", cut)
    huggingface.write(folder / "hf", architecture, weights.items(), tokenizer_from=folder / "tokenizer")
    write(folder / "out/model.gguf", architecture, weights.items(), kind=kind, tokenizer_from=folder / "hf")
    return weights


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(100)[None]).logits
    return found


@pytest.mark.parametrize("name", ["plain", "grouped", "tied", "qwen2"])
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    make(tmp_path, name)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    assert before.config.hidden_size == after.config.hidden_size
    assert after.config.rms_norm_eps == pytest.approx(before.config.rms_norm_eps, rel=1e-7)  # it is a float32 there
    for key in ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(after.config, key) == getattr(before.config, key), key
    weights = dict(after.named_parameters())
    for parameter_name, parameter in before.named_parameters():
        assert torch.equal(parameter, weights[parameter_name]), parameter_name
    assert torch.allclose(logits(before), logits(after), atol=1e-4)


@pytest.mark.parametrize("cut", CUTS)
def test_transformers_reads_the_same_tokenizer(cut: str, tmp_path: Path) -> None:
    make(tmp_path, "plain", cut=CUTS[cut])
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == cut
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    ids = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json")).encode("they don't think").ids
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert read("they don't think", add_special_tokens=False).input_ids == ids
    assert read.eos_token == "<end>"


@pytest.mark.parametrize(("kind", "error"), [("float16", 2e-3), ("bfloat16", 2e-2), ("q8_0", 3e-2)])
def test_kinds_store_what_they_can(kind: Kind, error: float, tmp_path: Path) -> None:
    weights = make(tmp_path, "tied", kind)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert stored["blk.1.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    down = stored["blk.1.ffn_down.weight"]  # rows of 80, no multiple of q8_0's 32
    expected = {"float16": "F16", "bfloat16": "BF16", "q8_0": "F16"}[kind]
    assert down.tensor_type.name == expected
    for leaf in ("down", "v"):
        name = {"down": "ffn_down", "v": "attn_v"}[leaf]
        read = gguf.dequantize(stored[f"blk.1.{name}.weight"].data, stored[f"blk.1.{name}.weight"].tensor_type)
        assert np.abs(read.reshape(-1) - weights[f"layers.1.{leaf}"].numpy().reshape(-1)).max() < error
        given = weights[f"layers.1.{leaf}"].numpy()
        as_gguf_does = gguf.quants.quantize(given, stored[f"blk.1.{name}.weight"].tensor_type)
        assert stored[f"blk.1.{name}.weight"].data.tobytes() == as_gguf_does.tobytes()


def test_stretched_rotary_embeddings_are_written_as_factors(tmp_path: Path) -> None:
    """llama.cpp divides each frequency by its factor; the result is transformers' own."""
    make(tmp_path, "llama-3.1")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    plain = 1.0 / LLAMA3.theta ** (np.arange(0, 16, 2) / 16)
    wanted = model.model.rotary_emb.inv_freq.numpy()
    assert np.allclose(plain / stored["rope_freqs.weight"].data, wanted, rtol=1e-6)
    assert stored["rope_freqs.weight"].data.max() == 8.0


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    architecture = Architecture(PLAIN)
    weights = tensors(architecture)
    save_tokenizer(tmp_path / "tokenizer")
    save_tokenizer(tmp_path / "odd", pre_tokenizers.Whitespace())
    save_tokenizer(tmp_path / "unigram")
    Tokenizer(models.Unigram([("a", -1.0)])).save(str(tmp_path / "unigram" / "tokenizer.json"))

    def refuse(match: str, given: Any, file: str = "out.gguf", tokenizer: str = "tokenizer", **how: Any) -> None:
        with pytest.raises(ValueError, match=match):
            write(tmp_path / file, architecture, given, tokenizer_from=tmp_path / tokenizer, **how)
        assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "odd", "unigram"}

    refuse("use .*out.gguf", weights.items(), file="out")
    refuse("lm_head was not given", list(weights.items())[:-1])
    refuse("more is not a tensor of this model", [*weights.items(), ("more", torch.ones(1))])
    refuse(r"embed has size \[2\]", [("embed", torch.ones(2))])
    refuse("embed holds NaN", [("embed", torch.full((300, 64), torch.nan))])
    large = {**weights, "layers.0.up": torch.full((96, 64), 7e4)}
    refuse("layers.0.up holds values beyond the range of torch.float16", large.items(), kind="float16")
    refuse(r"how this tokenizer cuts text \(Whitespace\) is not known", weights.items(), tokenizer="odd")
    refuse("a tokenizer of type 'Unigram' is not written as GGUF; use BPE", weights.items(), tokenizer="unigram")


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    weights = make(tmp_path, "gpt_neox")
    backwards = reversed(weights.items())
    write(tmp_path / "back.gguf", MODELS["gpt_neox"], backwards, kind="float32", tokenizer_from=tmp_path / "hf")
    one, other = (gguf.GGUFReader(tmp_path / file) for file in ("out/model.gguf", "back.gguf"))
    for first, second in zip(one.tensors, other.tensors, strict=True):
        assert first.name == second.name
        assert np.array_equal(first.data, second.data)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"family": "mistral", "window": 8}, "window=8: llama.cpp's llama ignores it"),
        ({"family": "qwen3", "qk_norm": True, "biases": QKV}, "biases of k, q, v: llama.cpp's qwen3 has none"),
        (
            {"family": "smollm3", "unturned_layers": frozenset({1})},
            r"unturned_layers=\[1\]: llama.cpp's smollm3 has \[\]",
        ),
        ({"family": "qwen2", "biases": QKV}, "hidden=64 is not heads=8 times head_dim=16"),
        ({"family": "other"}, "family=other is not written as GGUF; use one of llama"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        require(replace(MODELS["grouped"], **change))


@pytest.mark.rehearsal
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_goes_on_with_the_same_tokens(name: str, tmp_path: Path) -> None:
    cut = list(CUTS)[list(MODELS).index(name) % len(CUTS)]
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: it builds for 6 minutes; pip install '.[llama-cpp]'"
    )
    make(tmp_path, name, cut=CUTS[cut])
    here = llama_cpp.Llama(str(tmp_path / "out/model.gguf"), n_ctx=128, verbose=False, n_threads=1, logits_all=True)
    ids = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json")).encode(TEXT).ids
    assert here.tokenize(TEXT.encode(), add_bos=False) == ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    here.eval(ids)
    assert np.allclose(here.scores[: len(ids)], wanted.numpy(), atol=2e-2)
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    here.reset()
    stream = here.generate(ids, temp=0.0, repeat_penalty=1.0)
    assert [next(stream) for _ in range(16)] == greedy[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer such as LLaMA-2's, as SentencePiece made it and as transformers saves it."""
    import sentencepiece
    from transformers import LlamaTokenizerFast

    folder = tmp_path_factory.mktemp("llama2")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["they don't think that they'll jump over the quick brown foxes"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    LlamaTokenizerFast.from_pretrained(folder).save_pretrained(folder / "saved")
    return folder


def test_sentencepiece_is_written_piece_by_piece(llama2: Path, tmp_path: Path) -> None:
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(str(llama2 / "tokenizer.model"))
    architecture = Architecture(PLAIN)
    write(tmp_path / "out.gguf", architecture, tensors(architecture).items(), tokenizer_from=llama2)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    tokens, scores = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    kinds = [gguf.TokenType(kind) for kind in fields["tokenizer.ggml.token_type"].contents()]
    for i in range(library.vocab_size()):
        assert tokens[i] == library.id_to_piece(i)
        assert scores[i] == pytest.approx(library.get_score(i))
    assert kinds[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert len(tokens) == 300
    assert set(kinds[library.vocab_size() :]) <= {gguf.TokenType.UNUSED}


@pytest.mark.rehearsal
@pytest.mark.parametrize("form", ["", "saved"])
def test_llama_cpp_cuts_text_as_sentencepiece(form: str, llama2: Path, tmp_path: Path) -> None:
    import sentencepiece

    llama_cpp = pytest.importorskip("llama_cpp")
    library = sentencepiece.SentencePieceProcessor(str(llama2 / "tokenizer.model"))
    architecture = Architecture(PLAIN)
    write(tmp_path / "out.gguf", architecture, tensors(architecture).items(), tokenizer_from=llama2 / form)
    here = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=128, verbose=False, vocab_only=True)
    for text in ("they'll jump over", "think the brown", "quick Ä 東 12", TEXT):
        assert here.tokenize(text.encode(), add_bos=False) == library.encode(text), text
