"""The datatrove steps of ``prepare``: read a task's documents, tokenise them, write them as shards.

A task is a run of one domain's input that becomes one training and one held-out shard. It leaves a receipt, written
last, so a task that was killed has none and is done again.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from pydantic import ConfigDict, TypeAdapter

from shear_tron.data import documents
from shear_tron.data.documents import DAMAGED, Fields, Format, Piece
from shear_tron.data.manifest import Shard, require_size
from shear_tron.data.tokenizer import load
from shear_tron.files import sha256, write_atomically
from shear_tron.reading import read_json

WORK = ".prepare"  # receipts and unfinished files, inside the output folder
BATCH = 1000  # documents tokenised at a time
BATCH_CHARACTERS = 4_000_000  # or fewer, when they are long: bounds memory


@dataclass(frozen=True)
class Task:
    """``key`` names the task's content: the same input and settings, the same key."""

    domain: str
    key: str
    pieces: tuple[Piece, ...]
    format: Format
    fields: Fields
    cut: int | None
    limit: int | None
    held_out: float  # share of documents
    bytes: int  # of input, compressed
    keep: str | None = None  # file of one bool a document: False for a duplicate


@dataclass(frozen=True)
class Encoding:
    """How documents become ids: the tokenizer, the ids around each document, bytes an id."""

    tokenizer: str
    bos: int | None
    separator: int | None
    token_bytes: int


@dataclass(frozen=True)
class Receipt:
    """What a finished task made."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    train: Shard | None
    held_out: Shard | None
    empty: int
    damaged: int
    duplicates: int

    @staticmethod
    def path(output: str, task: Task) -> Path:
        return Path(output) / WORK / f"{task.key}.json"

    @classmethod
    def read(cls, output: str, task: Task, token_bytes: int) -> "Receipt | None":
        """The receipt of a task whose shards are all there; None for one that must be done (again)."""
        try:
            receipt = TypeAdapter(cls).validate_json(json.dumps(read_json(cls.path(output, task))), strict=True)
            for shard in (receipt.train, receipt.held_out):
                if shard is not None:
                    require_size(output, shard, token_bytes)
        except ValueError:  # none, or a damaged one
            return None
        return receipt


class Read(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """The documents of task ``rank``. A record that cannot be read is passed on as an empty document marked so."""

    name = "Read"
    type = "READER"

    def __init__(self, tasks: list[Task]):
        super().__init__()
        self.tasks = tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        task = self.tasks[rank]
        texts = 0
        for document in self._documents(task):
            if texts == task.limit:
                return
            texts += bool(document.text)
            yield document

    def _documents(self, task: Task) -> Iterator[Document]:
        for piece in task.pieces:
            for text in documents.read(piece, task.format, task.fields):
                if text is DAMAGED:
                    yield Document(text="", id=piece.path, metadata={"damaged": True})
                    continue
                for part in documents.cut(str(text), task.cut):
                    yield Document(text=part, id=piece.path)


class Tokenise(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Write task ``rank``'s documents as ``domain/train/key.ds`` and ``domain/held_out/key.ds``, then its receipt."""

    name = "Tokenise"
    type = "TOKENIZER"

    def __init__(self, tasks: list[Task], output: str, encoding: Encoding):
        super().__init__()
        self.tasks, self.output, self.encoding = tasks, output, encoding

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        task = self.tasks[rank]
        draft = Path(self.output) / WORK / f"{task.key}.{os.getpid()}.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        files = {split: self._file(draft, split) for split in ("train", "held_out")}
        keep = kept(task)
        counts = {"empty": 0, "damaged": 0, "duplicates": 0}
        number = 0
        for batch in _batches(data):
            texts: dict[str, list[str]] = {"train": [], "held_out": []}
            for document in batch:
                if not document.text:
                    counts["damaged" if document.metadata else "empty"] += 1
                    continue
                number += 1
                if keep is not None and not keep[number - 1]:
                    counts["duplicates"] += 1
                    continue
                aside = documents.is_held_out(documents.fingerprint(document.text), task.held_out)
                texts["held_out" if aside else "train"].append(document.text)
            for split, chosen in texts.items():
                self._write(files[split], chosen)
        train, held_out = (self._finish(file, draft, split, task) for split, file in files.items())
        shutil.rmtree(draft)
        receipt = Receipt(train, held_out, **counts)
        write_atomically(Receipt.path(self.output, task), json.dumps(asdict(receipt)))

    def _file(self, draft: Path, split: str) -> TokenizedFile:
        return TokenizedFile(
            str(draft),
            f"{split}.ds",
            tokenizer_name_or_path=self.encoding.tokenizer,
            save_final_metadata=True,
            token_size=self.encoding.token_bytes,
        )

    def _write(self, file: TokenizedFile, texts: list[str]) -> None:
        if not texts:
            return
        encoding = self.encoding
        before = [] if encoding.bos is None else [encoding.bos]
        after = [] if encoding.separator is None else [encoding.separator]
        ids = load(encoding.tokenizer).encode(texts)
        flat: list[int] = []
        ends = []
        for document in ids:
            flat += before
            flat += document
            flat += after
            ends.append(len(flat))
        file.write_bytes(np.array(flat, dtype=f"<u{encoding.token_bytes}").tobytes(), ends)
        self.stat_update("tokens", value=len(flat))

    def _finish(self, file: TokenizedFile, draft: Path, split: str, task: Task) -> Shard | None:
        """Close a shard and move it to its place, tokens last. None for a shard without documents."""
        file.close()
        if not file.doc_ends:
            return None
        name = f"{task.domain}/{split}/{task.key}.ds"
        hashes = sha256(draft / f"{split}.ds"), sha256(draft / f"{split}.ds.index")
        shard = Shard(name, len(file), len(file.doc_ends), *hashes)
        (Path(self.output) / name).parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".index", ".metadata", ""):
            with open(draft / f"{split}.ds{suffix}", "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(draft / f"{split}.ds{suffix}", Path(self.output) / f"{name}{suffix}")
        return shard


class Sign(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Write the fingerprints of task ``rank``'s documents, for finding duplicates: uint64 [documents, 2]."""

    name = "Sign"
    type = "DEDUP"

    def __init__(self, tasks: list[Task], output: str):
        super().__init__()
        self.tasks, self.output = tasks, output

    @staticmethod
    def path(output: str, task: Task) -> Path:
        return Path(output) / WORK / f"{task.key}.signatures.npy"

    @classmethod
    def read(cls, output: str, task: Task) -> npt.NDArray[np.uint64]:
        """Mapped from its file. ValueError where it is damaged."""
        file = cls.path(output, task)
        found = _array(file)
        if found.dtype != np.uint64 or found.ndim != 2 or found.shape[1] != 2:
            raise ValueError(f"{file} is damaged; delete it and run `shear-tron prepare` again")
        return found

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        joined = b"".join(documents.fingerprint(document.text) for document in data if document.text)
        save_atomically(self.path(self.output, self.tasks[rank]), np.frombuffer(joined, dtype="<u8").reshape(-1, 2))


def kept(task: Task) -> npt.NDArray[np.bool_] | None:
    """Which of a task's documents stay; None: all. ValueError where the file that says so is damaged."""
    if task.keep is None:
        return None
    found = _array(Path(task.keep))
    if found.dtype != np.bool_ or found.ndim != 1:
        raise ValueError(f"{task.keep} is damaged; delete it and run `shear-tron prepare` again")
    return found


def _array(file: Path) -> npt.NDArray[Any]:
    """Mapped from its file."""
    try:
        if not file.is_file():
            raise FileNotFoundError(file)
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception:  # numpy evaluates the header, in which anything may be wrong
        found = None
    if not isinstance(found, np.ndarray):  # a zip of several is none
        raise ValueError(f"{file} is damaged; delete it and run `shear-tron prepare` again")
    return found


def save_atomically(file: Path, array: npt.NDArray[Any]) -> None:
    draft = file.with_name(f".{os.getpid()}.{file.name}")
    np.save(draft, array)
    os.replace(draft, file)


def _batches(data: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists that stay small in number and in characters."""
    batch: list[Document] = []
    characters = 0
    for document in data:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
