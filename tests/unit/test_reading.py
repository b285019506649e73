"""Files that anyone may have written: a value, or one short line that names the file; never more."""

import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from shear_tron.checkpoint.safetensors_stream import open_file
from shear_tron.config import ConfigError, load
from shear_tron.data import documents
from shear_tron.data.documents import Fields, Piece
from shear_tron.reading import parse_yaml, read_json, read_text, short
from shear_tron.train.config import RunConfig

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
JSON = {
    "nan": '{"a": NaN}',
    "infinity": '{"a": -Infinity}',
    "beyond": '{"a": 1e999}',
    "deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"a": ' + "9" * 10_000 + "}",
    "list": "[1]",
    "half": '{"a": [1, 2',
    "empty": "",
}
YAML = {
    "bomb": BOMB,
    "alias": "a: &x 1\nb: *x\n",
    "deep": "a: " + "[" * 5000 + "]" * 5000,
    "many": "a: [" + "1, " * 200_000 + "]",
    "tag": "a: !!python/object/apply:os.system [ls]",
    "date": "a: 2026-13-45",
    "digits": "a: " + "9" * 10_000,
    "key": "? [a, b]\n: 1\n",
    "two": "a: 1\n---\nb: 2\n",
    "binary": "a: !!binary 'no base64!'",
    "omap": "a: !!omap [b]",
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON.keys())
def test_json_that_is_none_is_one_short_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json") as error:
        read_json(tmp_path / "x.json")
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", YAML.values(), ids=YAML.keys())
def test_yaml_that_is_none_is_one_short_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml") as error:
        load(RunConfig, tmp_path / "x.yaml")
    assert len(str(error.value).removeprefix(str(tmp_path))) < 400
    assert "\n" not in str(error.value)


def test_what_is_no_text_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", 1 << 40)
    for name, message in (
        ("bytes", r"bytes is not UTF-8 text \(at byte 2\)"),
        ("pipe", "pipe is no regular file"),
        (".", "is a folder"),
        ("none", r"none cannot be read \(No such file"),
        ("large", "has 1,099,511,627,776 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            read_text(tmp_path / name)


def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is no regular file"):
        open_file(tmp_path / "model.safetensors")


def test_a_line_without_end_is_one_damaged_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few bytes of .gz that unfold to gigabytes; those before and after it are read."""
    monkeypatch.setattr(documents, "LONGEST", 1000)
    lines = [
        b'{"text": "a"}',
        b'{"text": "' + b"x" * 5000 + b'"}',
        b'{"text": "' + b"y" * 988 + b'"}',
        b'{"text": "b"}',
    ]
    assert len(lines[2]) == 1000
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    found = list(documents.read(Piece(str(tmp_path / "x.jsonl.gz")), "jsonl", Fields("text")))
    assert found == ["a", documents.DAMAGED, documents.DAMAGED, "b"]
    (tmp_path / "x.txt").write_bytes(b"x" * 1001)
    with pytest.raises(ValueError, match="more than 1,000 bytes of text"):
        list(documents.read(Piece(str(tmp_path / "x.txt")), "text", Fields("text")))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_without_end_is_one_damaged_record(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(documents, "LONGEST", 1000)
    file = str(tmp_path / f"x.{kind}")
    table = pyarrow.table({"text": ["a", "x" * 5000, "b" * 900, "c"], "meta": [{"n": 1}] * 4})
    if kind == "parquet":
        parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    found = list(documents.read(Piece(file), "parquet" if kind == "parquet" else "datasets", Fields("text")))
    assert found == ["a", documents.DAMAGED, "b" * 900, "c"]


def test_large_rows_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    """64 MB in one row group, which is 130 KB of a file."""
    import pyarrow
    from pyarrow import parquet

    file = str(tmp_path / "x.parquet")
    rows = [str(number) + "x" * (1 << 20) for number in range(64)]
    pages = {"use_dictionary": False, "write_batch_size": 1}  # of a row each
    parquet.write_table(pyarrow.table({"text": rows}), file, compression="zstd", **pages)
    pool = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        assert sum(1 for _ in documents.read(Piece(file), "parquet", Fields("text"))) == 64
    finally:
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    assert pool.max_memory() < 40 << 20


def test_numbers_and_words_are_what_everybody_expects() -> None:
    assert parse_yaml("[1e-4, no, 'yes', true, 10]", "here") == [1e-4, "no", "yes", True, 10]


def test_values_in_errors_are_short() -> None:
    values: list[Any] = ["x" * 5000, ["x" * 5000], {"a": ["b"]}, list(range(99)), 10**9999, b"y" * 999]
    for value in values:
        assert len(short(value)) < 80


def test_every_problem_of_a_config_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "run: r\nmodel: 3\nmodell: x\ntrain: {steps: many, batch: -1}\noptimizer: {betas: [1, 2], clip: .nan}\n"
        f"data: {{folder: f, sequence: 8, weights: {{a: -1, b: .inf}}, mixture: {{flor: 0}}}}\nparallel: {'z' * 5000}\n"
    )
    with pytest.raises(ConfigError) as error:
        load(RunConfig, tmp_path / "x.yaml")
    told = str(error.value)
    for problem in (
        "12 problems:",
        "model=3: Input should be a valid string",
        "unknown key 'modell'; did you mean 'model'?",
        "train.steps='many'",
        "train.batch=-1",
        "optimizer.betas.0=1",
        "optimizer.betas.1=2",
        "optimizer.clip=nan",
        "data.weights.a=-1",
        "data.weights.b=inf",
        "unknown key 'data.mixture.flor'; did you mean 'floor'?",
        "parallel='zzz",
    ):
        assert problem in told
    assert len(told) < 2500
