"""prepare: the right ids in the right split, whatever the format, and whatever happens on the way."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from datatrove.utils.dataset import DatatroveFolderDataset
from pydantic import ValidationError
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from shear_tron.config import load
from shear_tron.data.documents import cut, fingerprint, is_held_out
from shear_tron.data.duplicates import firsts
from shear_tron.data.manifest import Manifest
from shear_tron.data.prepare import DomainSource, PrepareConfig, document, prepare, stats

SEPARATOR = "<|endoftext|>"
WORDS = ["shear", "the", "wool", "gently", "from", "a", "sheep", "and", "spin", "it", "into", "yarn", "while"]
WORDS += ["models", "forget", "what", "they", "never", "needed"]


def text(number: int) -> str:
    """A document that no other number has."""
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(20)) + f" {number}\n"


TEXTS = [text(number) for number in range(400)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder whose eos is not the document separator, as SmolLM2's."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [AddedToken(token, special=True) for token in (SEPARATOR, "<|im_start|>", "<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"})
    )
    return str(folder)


def write_jsonl(file: Path, texts: Iterable[str], **fields: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, **fields}) for text in texts]
    file.write_text("".join(line + "\n" for line in lines))
    return file


def config(folder: Path, tokenizer: str, domains: dict[str, Any], **changes: Any) -> PrepareConfig:
    given = {"held_out": 0.1, "workers": 1, "separator": SEPARATOR} | changes
    sources = {
        name: DomainSource(**(source if isinstance(source, dict) else {"path": str(source)}))
        for name, source in domains.items()
    }
    return PrepareConfig(output=str(folder / "out"), tokenizer=tokenizer, domains=sources, **given)


def documents(manifest: Manifest, name: str, split: str) -> list[list[int]]:
    """Every document of a split, as the ids on disk."""
    found = []
    for shard in getattr(manifest.domains[name], split):
        file = Path(manifest.folder) / shard.file
        ids, ends = np.fromfile(file, dtype=f"<u{manifest.token_bytes}"), np.fromfile(f"{file}.index", dtype="<u8")
        found += [part.tolist() for part in np.split(ids, ends[:-1].astype(int))]
    return found


def decoded(manifest: Manifest, name: str, split: str) -> list[str]:
    library = Library.from_file(str(Path(manifest.tokenizer) / "tokenizer.json"))
    library.decoder = __import__("tokenizers").decoders.ByteLevel()
    return [library.decode(document, skip_special_tokens=True) for document in documents(manifest, name, split)]


def everything(folder: str) -> dict[str, bytes]:
    """Every file a training run can see."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file() and ".prepare" not in file.parts
    }


# What comes out


def test_every_document_is_there_once_with_the_tokenizers_ids(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    manifest = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "in"}))
    library = Library.from_file(f"{tokenizer}/tokenizer.json")
    for split, chosen in (("train", False), ("held_out", True)):
        expected = [[*library.encode(t).ids, 0] for t in TEXTS if is_held_out(fingerprint(t), 0.1) is chosen]
        assert documents(manifest, "web", split) == expected
    assert 20 < manifest.domains["web"].documents("held_out") < 70  # 400 * 0.1, 4 standard deviations
    assert manifest == Manifest.read(manifest.folder, tokenizer, 500)


def test_datatroves_own_reader_reads_the_shards(tmp_path: Path, tokenizer: str) -> None:
    pytest.importorskip("torch")
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    manifest = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}))
    flat = np.concatenate(documents(manifest, "web", "train"))
    dataset = DatatroveFolderDataset(f"{manifest.folder}/web/train", seq_len=64, token_size=2, shuffle=False)
    assert len(dataset) == len(flat) // 65
    assert dataset[3]["input_ids"].tolist() == flat[3 * 65 : 4 * 65].tolist()


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({"separator": SEPARATOR}, [], [0]),
        ({"separator": None}, [], [2]),  # the tokenizer's eos
        ({"separator": None, "bos": True}, [1], [2]),
        ({"separator": "", "bos": True}, [1], []),
        ({"separator": ""}, [], []),
    ],
)
def test_bos_and_separator_are_what_the_config_says(
    tmp_path: Path, tokenizer: str, changes: dict[str, Any], before: list[int], after: list[int]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    manifest = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, held_out=0.0, **changes))
    library = Library.from_file(f"{tokenizer}/tokenizer.json")
    assert documents(manifest, "web", "train") == [before + library.encode(t).ids + after for t in TEXTS[:3]]
    assert manifest.bos == (before[0] if before else None)
    assert manifest.separator == (after[0] if after else None)


def test_special_tokens_spelt_in_a_text_are_text(tmp_path: Path, tokenizer: str) -> None:
    """A page that quotes <|endoftext|> must not end its document."""
    write_jsonl(tmp_path / "a.jsonl", [f"quoting {SEPARATOR} here"])
    manifest = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, held_out=0.0))
    ((*body, last),) = documents(manifest, "web", "train")
    assert last == 0
    assert 0 not in body


@pytest.mark.slow
def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    library = Library(
        models.WordLevel({f"w{i}": i for i in range(70000)} | {"<unk>": 70000, "</s>": 70001}, unk_token="<unk>")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", ["w69999 w3"])
    arguments = {"held_out": 0.0, "separator": "</s>"}
    manifest = prepare(config(tmp_path, str(tmp_path / "tokenizer.json"), {"web": tmp_path / "a.jsonl"}, **arguments))
    assert manifest.token_bytes == 4
    assert documents(manifest, "web", "train") == [[69999, 3, 70001]]


# Splits


def test_held_out_is_a_function_of_the_text_alone(tmp_path: Path, tokenizer: str) -> None:
    """Whatever file, domain or order a text comes in, it is on the same side; adding files moves nothing."""
    write_jsonl(tmp_path / "in" / "b.jsonl", TEXTS[:200])
    first = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "in"}))
    before = {split: set(decoded(first, "web", split)) for split in ("train", "held_out")}
    write_jsonl(tmp_path / "in" / "a.jsonl", reversed(TEXTS[150:]))
    write_jsonl(tmp_path / "other.jsonl", TEXTS[100:300])
    second = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "in", "more": tmp_path / "other.jsonl"}))
    after = {split: set(decoded(second, "web", split)) | set(decoded(second, "more", split)) for split in before}
    assert before["train"] <= after["train"]
    assert before["held_out"] <= after["held_out"]
    assert not after["train"] & after["held_out"]
    assert after["train"] | after["held_out"] == set(TEXTS)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_the_share_held_out_is_the_share_asked_for(share: float) -> None:
    held = sum(is_held_out(fingerprint(f"document {number}"), share) for number in range(20_000))
    assert abs(held - share * 20_000) <= 4 * (20_000 * share * (1 - share)) ** 0.5


def test_a_domain_may_hold_out_more(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    small = {"path": str(tmp_path / "a.jsonl"), "held_out": 0.5}
    manifest = prepare(config(tmp_path, tokenizer, {"small": small, "large": tmp_path / "a.jsonl"}, held_out=0.05))
    assert manifest.domains["small"].documents("held_out") > 4 * manifest.domains["large"].documents("held_out")


# Duplicates


@pytest.mark.parametrize(("mode", "web", "code"), [("no", 30, 20), ("domain", 20, 20), ("all", 20, 10)])
def test_duplicates(tmp_path: Path, tokenizer: str, mode: str, web: int, code: int) -> None:
    write_jsonl(tmp_path / "web" / "1.jsonl", [*TEXTS[:10], *TEXTS[5:10]])
    write_jsonl(tmp_path / "web" / "2.jsonl", [*TEXTS[:5], *TEXTS[10:20]])
    write_jsonl(tmp_path / "code.jsonl", TEXTS[10:30])
    domains = {"web": tmp_path / "web", "code": tmp_path / "code.jsonl"}
    manifest = prepare(config(tmp_path, tokenizer, domains, held_out=0.0, deduplicate=mode))
    assert manifest.domains["web"].documents() == web
    assert manifest.domains["code"].documents() == code
    assert manifest.domains["web"].duplicates == (None if mode == "no" else 30 - web)
    if mode == "all":
        assert decoded(manifest, "web", "train") == TEXTS[:20]  # the first of equal texts stays, in order
        assert decoded(manifest, "code", "train") == TEXTS[20:30]


def test_a_domain_of_copies_is_told_from_one_without_text(tmp_path: Path, tokenizer: str) -> None:
    domains = {name: write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[:20]) for name in ("web", "copy")}
    with pytest.raises(ValueError, match="domain 'copy': all its 20 documents are copies of earlier ones; leave it"):
        prepare(config(tmp_path, tokenizer, domains, deduplicate="all"))


def test_the_first_of_equal_fingerprints_stays() -> None:
    rows = np.array([[1, 2], [1, 3], [4, 2], [1, 2], [4, 2], [2, 1]], dtype=np.uint64)
    assert sorted(firsts(rows).tolist()) == [0, 1, 2, 5]


def test_duplicates_with_a_file_added_in_front(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "web" / "2.jsonl", TEXTS[:20])
    settings = {"held_out": 0.0, "deduplicate": "all"}
    prepare(config(tmp_path, tokenizer, {"web": tmp_path / "web"}, **settings))
    write_jsonl(tmp_path / "web" / "1.jsonl", TEXTS[10:30])
    manifest = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "web"}, **settings))
    assert sorted(decoded(manifest, "web", "train")) == sorted(TEXTS[:30])


# What the command says


def test_what_a_document_becomes_is_said(tmp_path: Path, tokenizer: str) -> None:
    given = config(tmp_path, tokenizer, {"web": tmp_path}, separator=None)  # the tokenizer's eos
    assert document(given) == "document = ids + <|im_end|> (2)"
    assert document(given.model_copy(update={"bos": True, "separator": ""})) == "document = <|im_start|> (1) + ids"


def test_no_is_a_word(tmp_path: Path, tokenizer: str) -> None:
    file = tmp_path / "prepare.yaml"
    file.write_text(f"output: a\ntokenizer: {tokenizer}\ndeduplicate: no\nbos: true\ndomains: {{yes: {{path: b}}}}\n")
    loaded = load(PrepareConfig, file, ["deduplicate=no"])
    assert (loaded.deduplicate, loaded.bos, list(loaded.domains)) == ("no", True, ["yes"])


def test_few_held_out_tokens_are_a_warning(tmp_path: Path, tokenizer: str, caplog: pytest.LogCaptureFixture) -> None:
    prepare(config(tmp_path, tokenizer, {"web": write_jsonl(tmp_path / "a.jsonl", TEXTS[:40])}, held_out=0.1))
    assert "tokens are held out, less than a window of 512" in caplog.text


def test_a_field_that_is_no_text_says_what_it_is(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    chat = {"path": str(tmp_path / "a.jsonl"), "text": "messages"}
    with pytest.raises(ValueError, match="field 'messages' holds list, not text"):
        prepare(config(tmp_path, tokenizer, {"chat": chat}))


# Formats and layouts


def _gz(file: Path, content: bytes) -> None:
    file.write_bytes(gzip.compress(content))


def _zst(file: Path, content: bytes) -> None:
    file.write_bytes(zstandard.compress(content))


def jsonl_lines(texts: list[str], **fields: Any) -> bytes:
    return "".join(json.dumps({"text": text, **fields}) + "\n" for text in texts).encode()


def redpajama(folder: Path) -> DomainSource:
    """RedPajama-1T: a folder a domain, {"text", "meta"} records, Common Crawl compressed and nested by dump."""
    (folder / "common_crawl" / "2023-06").mkdir(parents=True)
    _zst(
        folder / "common_crawl" / "2023-06" / "en_head_0000.json.gz.dedup.jsonl.zst",
        jsonl_lines(TEXTS[:30], meta={"source": "cc"}),
    )
    write_jsonl(folder / "common_crawl" / "2023-06" / "en_head_0001.jsonl", TEXTS[30:40], meta={"source": "cc"})
    return DomainSource(path=str(folder / "common_crawl"))


def slimpajama(folder: Path) -> DomainSource:
    """SlimPajama: all domains in the same files, told apart by a nested field."""
    chunk = folder / "train" / "chunk1"
    chunk.mkdir(parents=True)
    mixed = [
        json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4" if place < 40 else "RedPajamaBook"}})
        for place, text in enumerate(TEXTS[:60])
    ]
    _zst(chunk / "example_train_0.jsonl.zst", "\n".join(mixed).encode())
    return DomainSource(path=str(folder / "train"), where={"meta.redpajama_set_name": "RedPajamaC4"})


def dolma(folder: Path) -> DomainSource:
    """Dolma: one folder, files named by source, .json.gz with id, text, source, added, metadata."""
    folder.mkdir(parents=True)
    _gz(folder / "c4-0000.json.gz", jsonl_lines(TEXTS[:25], id="x", source="c4", metadata={"length": 3}))
    _gz(folder / "c4-0001.json.gz", jsonl_lines(TEXTS[25:40], id="x", source="c4"))
    _gz(folder / "books-0000.json.gz", jsonl_lines(TEXTS[40:60], id="x", source="books"))
    return DomainSource(path=str(folder / "c4-*.json.gz"))


def fineweb(folder: Path) -> DomainSource:
    """FineWeb: parquet by dump, with many columns."""
    (folder / "data" / "CC-MAIN-2024-10").mkdir(parents=True)
    for number, texts in enumerate((TEXTS[:30], TEXTS[30:40])):
        table = pyarrow.table({"text": texts, "id": ["i"] * len(texts), "language_score": [0.9] * len(texts)})
        pyarrow.parquet.write_table(table, folder / "data" / "CC-MAIN-2024-10" / f"000_{number:05d}.parquet")
    return DomainSource(path=str(folder / "data"))


def saved_dataset(folder: Path) -> DomainSource:
    """What datasets.save_to_disk leaves, its cache files included."""
    folder.mkdir(parents=True)
    table = pyarrow.table({"content": TEXTS[:40], "stars": list(range(40))})
    for name, rows in (("data-00000-of-00002", table[:30]), ("data-00001-of-00002", table[30:]), ("cache-1f2e", table)):
        with (
            pyarrow.OSFile(str(folder / f"{name}.arrow"), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as stream,
        ):
            stream.write_table(rows, max_chunksize=7)
    (folder / "dataset_info.json").write_text("{}")
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in (0, 1)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    return DomainSource(path=str(folder), text="content")


def plain_text(folder: Path) -> DomainSource:
    for number, text in enumerate(TEXTS[:40]):
        file = folder / f"{number // 10}" / f"{number:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / ".hidden.txt").write_text("not to be read")
    return DomainSource(path=str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [redpajama, slimpajama, dolma, fineweb, saved_dataset, plain_text])
def test_layouts(tmp_path: Path, tokenizer: str, layout: Any) -> None:
    source = layout(tmp_path / "corpus")
    manifest = prepare(config(tmp_path, tokenizer, {"web": source.model_dump()}, held_out=0.0))
    assert sorted(decoded(manifest, "web", "train")) == sorted(TEXTS[:40])


@pytest.mark.slow
@pytest.mark.parametrize("piece_bytes", [20, 97, 1000, 10**9, "line", "line and its end"])
@pytest.mark.parametrize("ending", ["\n", "", "\n\n"])
def test_pieces_of_a_file_hold_every_line_once(
    tmp_path: Path, tokenizer: str, piece_bytes: int | str, ending: str
) -> None:
    texts = [*TEXTS[:6], "ünïcödé \u2028 line", *TEXTS[6:9]]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + ending)
    if isinstance(piece_bytes, str):  # cuts just before and just after a line's end
        piece_bytes = len(lines[0].encode()) + (piece_bytes != "line")
    manifest = prepare(
        config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, held_out=0.0, piece_bytes=piece_bytes)
    )
    assert decoded(manifest, "web", "train") == texts


def test_limit_counts_documents_over_files(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "in" / "1.jsonl", ["", *TEXTS[:10]])
    write_jsonl(tmp_path / "in" / "2.jsonl", TEXTS[10:20])
    source = {"path": str(tmp_path / "in"), "limit": 13}
    manifest = prepare(config(tmp_path, tokenizer, {"web": source}, held_out=0.0))
    assert decoded(manifest, "web", "train") == TEXTS[:13]


@pytest.mark.parametrize("longest", [1, 10, 50, 10**6])
def test_cut_loses_nothing_and_is_short(longest: int) -> None:
    text = "".join(TEXTS[:3]) + "\n\nword" * 20 + "x" * 200
    parts = list(cut(text, longest))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= max(longest, 1)
    assert all(parts)


def test_cut_prefers_blank_lines() -> None:
    assert list(cut("one two\n\nthree four\nfive six", 15)) == ["one two\n\n", "three four\n", "five six"]


# Kill, resume, repeat


def test_running_again_does_and_changes_nothing(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    settings = config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, piece_bytes=9000)
    prepare(settings)
    before = everything(settings.output)
    times = {file: os.stat(f"{settings.output}/{file}").st_mtime_ns for file in before if file != "domains.json"}
    prepare(settings)
    assert everything(settings.output) == before
    assert times == {file: os.stat(f"{settings.output}/{file}").st_mtime_ns for file in times}


def test_a_changed_file_is_tokenised_again_and_others_are_not(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "in" / "1.jsonl", TEXTS[:50])
    write_jsonl(tmp_path / "in" / "2.jsonl", TEXTS[50:60])
    settings = config(tmp_path, tokenizer, {"web": tmp_path / "in"}, held_out=0.0)
    first = prepare(settings)
    write_jsonl(tmp_path / "in" / "2.jsonl", TEXTS[60:80])
    second = prepare(settings)
    assert first.domains["web"].train[0] == second.domains["web"].train[0]
    assert decoded(second, "web", "train") == TEXTS[:50] + TEXTS[60:80]


def test_another_tokenizer_or_policy_does_not_reuse_shards(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    first = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, held_out=0.0))
    second = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, held_out=0.0, separator=None))
    assert first.domains["web"].train[0].file != second.domains["web"].train[0].file


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, tokenizer: str, damage: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    settings = config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"})
    before = everything(prepare(settings).folder)
    shard = Path(settings.output) / Manifest.read(settings.output).domains["web"].train[0].file
    content = shard.read_bytes()
    shard.unlink() if damage == "missing" else shard.write_bytes(content[:-2] if damage == "short" else content + b"12")
    with pytest.raises(ValueError, match="is missing" if damage == "missing" else "it is damaged"):
        Manifest.read(settings.output)
    prepare(settings)
    assert everything(settings.output) == before


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    manifest = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}))
    manifest.verify()
    shard = Path(manifest.folder) / manifest.domains["web"].train[0].file
    content = bytearray(shard.read_bytes())
    content[101] ^= 1
    shard.write_bytes(content)
    Manifest.read(manifest.folder)  # sizes are right
    with pytest.raises(ValueError, match="does not have its sha256"):
        manifest.verify()


def processes_of(script: Path) -> list[str]:
    """Processes that ``script`` started, directly or not: its path is in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"STARTED_BY={script}".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:  # it ended meanwhile
            continue
    return found


SCRIPT = """
import sys
from shear_tron.data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    prepare(PrepareConfig.model_validate_json(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_time_and_started_again_gives_the_same_bytes(
    tmp_path: Path, tokenizer: str, workers: int
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    settings = config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, piece_bytes=100_000, workers=workers)
    whole = settings.model_copy(update={"output": str(tmp_path / "whole"), "workers": 1})
    expected = everything(prepare(whole).folder)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    shards, kills = 0, 0
    while not (Path(settings.output) / "domains.json").exists():
        assert kills < 15
        process = subprocess.Popen(
            [sys.executable, script, settings.model_dump_json()],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "STARTED_BY": str(script)},
        )
        while process.poll() is None and len(list(Path(settings.output).glob("*/train/*.ds"))) < shards + 3:
            time.sleep(0.001)
        if process.poll() is None and shards < 9:
            process.send_signal(signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        shards = len(list(Path(settings.output).glob("*/train/*.ds")))
    assert kills >= 2
    assert everything(settings.output) == expected
    assert not list((Path(settings.output) / ".prepare").glob("*.tmp"))
    deadline = time.monotonic() + 5
    while left := processes_of(script):
        assert time.monotonic() < deadline, f"killed runs left processes {left}"
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_in_processes_give_the_same_bytes(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    alone = config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, piece_bytes=9000, deduplicate="all")
    together = alone.model_copy(update={"output": str(tmp_path / "together"), "workers": 2})
    assert everything(prepare(alone).folder) == everything(prepare(together).folder)


def test_two_runs_on_one_folder_are_refused(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    settings = config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"})
    prepare(settings)
    hold = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX)\nprint(flush=True); input()"
    )
    lock = Path(settings.output) / ".prepare" / "lock"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match="being prepared by another process"):
            prepare(settings)
        other.communicate(b"\n")
    prepare(settings)


# Bad input


def test_damaged_records_are_counted_and_beyond_a_share_refused(tmp_path: Path, tokenizer: str) -> None:
    good = jsonl_lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "broken\n' + good + b'{"text": ""}\n{"text": null}\n\xff\xfe\n')
    settings = config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}, held_out=0.0)
    with pytest.raises(ValueError, match=r"domain 'web': 2 records of .* cannot be read, more than damaged=0.001"):
        prepare(settings)
    manifest = prepare(settings.model_copy(update={"damaged": 0.01}))
    assert (manifest.domains["web"].damaged, manifest.domains["web"].empty) == (2, 2)
    assert decoded(manifest, "web", "train") == TEXTS


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (None, {}, r"domain 'web': path=.* does not exist"),
        (b"", {}, r"domain 'web': .* holds no text in field 'text'"),
        (b'{"text": ""}\n', {}, r"domain 'web': .* holds no text"),
        (b'{"content": "a", "id": 3}\n', {}, r"has no text field 'text'; its fields are content, id"),
        (b'{"text": "a", "id": 3}\n', {"text": "meta.text"}, r"has no text field 'meta.text'"),
        (b'{"text": 5}\n', {}, r"field 'text' holds int, not text"),
        (b"[1, 2]\n", {}, r"has no text field 'text'; its fields are list"),
        (b'{"text": "a"}\n', {"where": {"source": "c4"}}, r"holds no text"),
    ],
)
def test_input_without_text_is_one_clear_line(
    tmp_path: Path, tokenizer: str, content: bytes | None, source: dict[str, Any], message: str
) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        prepare(config(tmp_path, tokenizer, {"web": {"path": str(tmp_path / "a.jsonl"), **source}}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2", "a.parquet"])
def test_a_file_cut_short_is_an_error_and_not_a_smaller_corpus(tmp_path: Path, tokenizer: str, name: str) -> None:
    """zstandard's own reader would hand out what there is and say nothing."""
    lines = jsonl_lines([f"{number} {text}" for number in range(20) for text in TEXTS])
    pack = {"zst": zstandard.compress, "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
    file = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    else:
        file.write_bytes(pack[file.suffix[1:]](lines))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read to its end") as error:
        prepare(config(tmp_path, tokenizer, {"web": file}))
    assert "\n" not in str(error.value)


def test_zstandard_files_of_several_frames_are_read_whole(tmp_path: Path, tokenizer: str) -> None:
    frames = [zstandard.compress(jsonl_lines(TEXTS[start : start + 10])) for start in range(0, 40, 10)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    manifest = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl.zst"}, held_out=0.0))
    assert decoded(manifest, "web", "train") == TEXTS[:40]


def test_parquet_without_the_field_names_its_columns(tmp_path: Path, tokenizer: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"raw": ["a"], "url": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no text field 'text'; its fields are raw, url"):
        prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.parquet"}))


@pytest.mark.slow
def test_errors_of_worker_processes_stay_one_clear_line(tmp_path: Path, tokenizer: str) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"has no text field 'text'; its fields are body"):
        prepare(config(tmp_path, tokenizer, {"web": tmp_path / "*.jsonl"}, workers=2))


def test_folders_that_cannot_be_read_say_why(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds nothing to read"):
        prepare(config(tmp_path, tokenizer, {"web": tmp_path / "empty"}))
    write_jsonl(tmp_path / "mixed" / "a.jsonl", TEXTS[:1])
    (tmp_path / "mixed" / "b.txt").write_text("x")
    with pytest.raises(ValueError, match="holds jsonl, text; set format"):
        prepare(config(tmp_path, tokenizer, {"web": tmp_path / "mixed"}))
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"holds the splits train, test; give one, .*dict/train"):
        prepare(config(tmp_path, tokenizer, {"web": tmp_path / "dict"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"separator": "<|endofdoc|>"}, r"token '<\|endofdoc\|>' is not in the vocabulary .*<\|endoftext\|>"),
        ({"tokenizer": "/nowhere"}, "tokenizer=/nowhere is not a tokenizer"),
    ],
)
def test_tokens_and_tokenizers_that_are_not_there(
    tmp_path: Path, tokenizer: str, changes: dict[str, Any], message: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    given = config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}).model_copy(update=changes)
    with pytest.raises(ValueError, match=message):
        prepare(given)


def test_config_keys_and_domain_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="seperator"):
        PrepareConfig(output="o", tokenizer="t", domains={"web": DomainSource(path="p")}, seperator="x")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="used as a folder"):
        PrepareConfig(output="o", tokenizer="t", domains={"../web": DomainSource(path="p")})
    with pytest.raises(ValidationError, match="at least 1"):
        PrepareConfig(output="o", tokenizer="t", domains={})


# What training checks


def test_manifest_refuses_another_tokenizer_or_vocabulary(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    manifest = prepare(config(tmp_path, tokenizer, {"web": tmp_path / "a.jsonl"}))
    Manifest.read(manifest.folder, vocab=512)  # padded
    for vocab in (499, 600, 128256):
        with pytest.raises(ValueError, match=f"vocab={vocab} does not fit data made with the 500 ids"):
            Manifest.read(manifest.folder, vocab=vocab)

    saved = json.loads(Path(tokenizer, "tokenizer.json").read_text())
    (tmp_path / "resaved.json").write_text(json.dumps(saved, indent=3) + "\n")
    Manifest.read(manifest.folder, str(tmp_path / "resaved.json"))
    saved["model"]["merges"][0], saved["model"]["merges"][1] = saved["model"]["merges"][1], saved["model"]["merges"][0]
    (tmp_path / "other.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"other.json .* is not the one that made"):
        Manifest.read(manifest.folder, str(tmp_path / "other.json"))


def test_manifest_of_nothing_or_of_damage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no domains.json; make it with `shear-tron prepare`"):
        Manifest.read(str(tmp_path))
    (tmp_path / "domains.json").write_text('{"format": 1, "domains"')
    with pytest.raises(ValueError, match="is damaged"):
        Manifest.read(str(tmp_path))
    (tmp_path / "domains.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="format=9, not 1"):
        Manifest.read(str(tmp_path))


def test_stats_counts_and_draws(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:50])
    domains = {"web": tmp_path / "a.jsonl", "code": tmp_path / "b.jsonl"}
    manifest = prepare(config(tmp_path, tokenizer, domains))
    table = stats(manifest.folder, str(tmp_path / "stats.png")).splitlines()
    assert table[0].split()[:4] == ["domain", "tokens", "share", "documents"]
    assert table[1].split()[:2] == ["web", f"{sum(map(len, documents(manifest, 'web', 'train'))):,}"]
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
