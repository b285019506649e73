"""Ids are the tokenizer library's own, for both kinds of tokenizer files."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from shear_tron.data.manifest import Manifest
from shear_tron.data.prepare import DomainSource, PrepareConfig, prepare
from shear_tron.data.tokenizer import Tokenizer, fingerprint

from .test_data_prepare import TEXTS, documents, write_jsonl

# What tokenizers disagree about: white-space runs, tabs, line ends, digits, merges over repeats, bytes, controls.
HARD = [
    "",
    " ",
    "  leading and   inner    runs  ",
    "\ttab\n\nblank lines\r\n",
    "def f(x):\n        return x  # eight spaces",
    "aaaaaaaaaaaaaaaaaaaaaaaa hahahahahaha",
    "1234567890 3.14159 2**64",
    "naïve café \u2028 \u00a0 nbsp, \u200b zero width",
    "日本語 한국어 русский العربية",
    "🐑🐏 emoji \U0001f9f6",
    "<s> and </s> and <unk> as text",
    "▁the sentencepiece space itself",
    "\x00\x07 control bytes",
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-like SentencePiece model: BPE, byte fallback, digits split, white space kept."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *HARD] * 3),
        model_writer=out,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    file.write_bytes(out.getvalue())
    return file


def test_sentencepiece_ids_on_disk_are_sentencepieces(tmp_path: Path, model: Path) -> None:
    """Not what a converted tokenizer.json gives: through the whole of prepare, document by document."""
    texts = [text for text in [*HARD, *TEXTS] if text]
    write_jsonl(tmp_path / "a.jsonl", texts)
    source = DomainSource(path=str(tmp_path / "a.jsonl"))
    settings = PrepareConfig(
        output=str(tmp_path / "out"),
        tokenizer=str(model.parent),
        domains={"web": source},
        held_out=0,
        bos=True,
        workers=1,
    )
    manifest = prepare(settings)
    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert documents(manifest, "web", "train") == [[own.bos_id(), *own.encode(text), own.eos_id()] for text in texts]
    assert (manifest.vocab, manifest.bos, manifest.separator) == (600, 1, 2)
    Manifest.read(manifest.folder, str(model), 600)


def test_json_ids_are_the_librarys_without_its_special_tokens(tmp_path: Path) -> None:
    """A post-processor that adds BOS, truncation and padding all stay out of it."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken("<s>", special=True), AddedToken("<pad>", special=True)]
    library.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    plain = [library.encode(text).ids for text in HARD if "<s>" not in text]
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(5)
    library.enable_padding(length=50, pad_id=1, pad_token="<pad>")
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(str(tmp_path)).encode([text for text in HARD if "<s>" not in text]) == plain


def test_vocab_counts_added_tokens_beyond_the_model(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.add_special_tokens([AddedToken("<x>", special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(str(tmp_path))
    assert (tokenizer.vocab, tokenizer.id("<x>"), tokenizer.bos, tokenizer.eos) == (3, 2, None, None)


def test_fingerprint_follows_the_ids(tmp_path: Path, model: Path) -> None:
    assert fingerprint(str(model)) == fingerprint(str(model.parent)) == Tokenizer(str(model)).sha256
    copy = tmp_path / "other.model"
    copy.write_bytes(model.read_bytes() + b"\x00")
    assert fingerprint(str(copy)) != fingerprint(str(model))


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", b"{"), ("tokenizer.json", b"[]"), ("a.model", b"junk")]
)
def test_unreadable_tokenizers_are_one_clear_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer=.*; use a") as error:
        Tokenizer(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_eos_asks_for_a_separator(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    source = DomainSource(path=str(tmp_path / "a.jsonl"))
    settings = PrepareConfig(output=str(tmp_path / "out"), tokenizer=str(tmp_path), domains={"web": source}, workers=1)
    with pytest.raises(ValueError, match="names no eos token; give a separator"):
        prepare(settings)
    with pytest.raises(ValueError, match="names no bos token; use bos=false"):
        prepare(settings.model_copy(update={"bos": True, "separator": "b"}))


def test_a_tokenizer_that_its_library_panics_at_is_refused(tmp_path: Path) -> None:
    library = Library(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    content = json.loads(library.to_str())
    content["model"]["continuing_subword_prefix"] = "0" * 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read .*; use a complete tokenizer.json"):
        Tokenizer(str(tmp_path))
