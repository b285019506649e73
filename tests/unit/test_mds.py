"""The released code's token shards, written here as mosaicml-streaming lays them out, become prepared data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import write_mds
from tokenizers import Tokenizer, models

from shear_tron import cli
from shear_tron.data.manifest import Manifest
from shear_tron.data.mds import _described, samples
from shear_tron.data.sampler import Windows

VOCABULARY = {"<s>": 1, "</s>": 2, "<unk>": 0} | {f"w{i}": i for i in range(3, 300)}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Two domains of samples of 16 tokens; ``wide`` has them as int64."""
    (tmp_path / "words").mkdir()
    Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>")).save(str(tmp_path / "words/tokenizer.json"))
    (tmp_path / "words/tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    for split, count in (("for_prune", 5), ("eval", 2)):
        for name, dtype in (("narrow", "<u2"), ("wide", "<i8")):
            found = [sample(split, name, i).astype(dtype).tobytes() for i in range(count)]
            write_mds(tmp_path / split / name, [found[:2], found[2:]] if count > 2 else [found])
    return tmp_path


def sample(split: str, name: str, number: int) -> Any:
    ids = np.arange(16) * 7 % 290 + 3 + number + len(split) * len(name) % 5
    ids[5:7] = 2, 1  # a document ends, another begins
    return ids


def run(theirs: Path, *options: str) -> int:
    words = ["--tokenizer", str(theirs / "words"), "--held-out", str(theirs / "eval")]
    return cli.main(["import", str(theirs / "for_prune"), str(theirs / "data"), *words, *options])


def test_every_token_is_where_it_was(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(theirs) == 0
    assert "160 tokens to train on" in capsys.readouterr().out
    manifest = Manifest.read(str(theirs / "data"), tokenizer=str(theirs / "words"), vocab=300)
    manifest.verify()
    assert (manifest.bos, manifest.separator, manifest.vocab) == (1, 2, 300)
    for name in ("narrow", "wide"):
        domain = manifest.domain(name)
        assert (domain.tokens(), domain.tokens("held_out")) == (80, 32)
        for split, shards, count in (("for_prune", domain.train, 5), ("eval", domain.held_out, 2)):
            windows = Windows(manifest, shards, 16 * count - 1)
            out = np.empty((1, 16 * count), "<u2")
            windows.read_into(out, np.array([0]), np.array([0]))
            assert (out[0] == np.concatenate([sample(split, name, i) for i in range(count)])).all()
        ends = np.fromfile(theirs / "data" / f"{domain.train[0].file}.index", "<u8")
        assert ends.tolist() == [6, 16, 22, 32]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compression": "zstd"}, "compression='zstd'; write the shards again without"),
        ({"samples": 9}, "does not hold 9 samples; copy it again"),
        ({"raw_data": {"basename": "../x.mds"}}, "no file of its folder"),
        ({"column_names": ["text", "set"]}, "describes no MDS (shards.0: has no column 'tokens'); copy it again"),
        ({"column_encodings": ["str", "pkl"]}, "with tokens as bytes"),
        ({"version": 1}, "use MDS, version 2"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    changes: dict[str, Any], match: str, theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mds(theirs / "for_prune/again", [[sample("eval", "again", 0).astype("<u2").tobytes()]], **changes)
    write_mds(theirs / "eval/again", [[sample("eval", "again", 0).astype("<u2").tobytes()]])
    assert run(theirs) == 2
    *bars, said = capsys.readouterr().err.splitlines()
    assert match in said
    assert all("shards" in line for line in bars)


def test_what_does_not_belong_together_is_refused(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mds(theirs / "for_prune/more", [[np.full(16, 999, "<u2").tobytes()]])
    assert run(theirs) == 2
    assert "has no more/index.json" in capsys.readouterr().err
    write_mds(theirs / "eval/more", [[np.full(16, 999, "<u2").tobytes()]])
    assert run(theirs) == 2
    assert "holds ids that" in capsys.readouterr().err
    assert not (theirs / "data/domains.json").exists()
    given = ["import", str(theirs / "for_prune"), str(theirs / "data"), "--tokenizer", str(theirs / "words")]
    assert cli.main(given) == 2
    assert "give those held out with --held-out FOLDER" in capsys.readouterr().err


def test_a_file_cut_short_anywhere_is_named(tmp_path: Path) -> None:
    write_mds(tmp_path / "a", [[b"1234"]])
    file = tmp_path / "a" / "shard.00000.mds"
    whole = file.read_bytes()
    (described,) = _described(tmp_path / "a")
    head = np.array([1, 12, 14], "<u4").tobytes()  # and a sample of two bytes
    for content in (*(whole[:length] for length in range(len(whole))), head + b"xx"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard.00000.mds .*; copy it again"):
            list(samples(tmp_path / "a", described))
