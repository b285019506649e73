"""Texts out of files: one function a format, all of them strict about what they cannot read.

Compressed files (.gz, .zst, .bz2, .xz) are read as they are, local paths or any URL that fsspec knows.
"""

import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, cast

import fsspec  # type: ignore[import-untyped]

from shear_tron.reading import first_line

Format = Literal["jsonl", "parquet", "text", "datasets"]

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".arrow": "datasets",
}


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of one that begin at bytes [start, stop)."""

    path: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Fields:
    """Where in a record the text is, and which records count. Names may be dotted: ``meta.source``."""

    text: str
    where: tuple[tuple[str, str], ...] = ()

    def columns(self) -> list[str]:
        return sorted({name.split(".")[0] for name in (self.text, *(name for name, _ in self.where))})

    def pick(self, record: Any, place: str) -> str | None:
        """The text of a record, None for one that ``where`` leaves out. ValueError when the field is missing."""
        for name, value in self.where:
            if str(_dig(record, name)) != value:
                return None
        text = _dig(record, self.text)
        if text is _ABSENT:
            known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{place} has no text field {self.text!r}; its fields are {known}, set `text` to one of them"
            )
        if not isinstance(text, str | None):
            raise ValueError(
                f"{place}: field {self.text!r} holds {type(text).__name__}, not text; set `text` to a field of text, "
                "or write the text out beforehand"
            )
        return text or ""


_ABSENT = object()
DAMAGED = object()  # stands for a record that could not be read
LONGEST = 256 << 20  # bytes of a line, a row or a text file, decompressed; 13 MB of .gz can unfold to gigabytes
AT_ONCE = 16 << 20  # bytes of Parquet rows decompressed at once, about, and
MOST_ROWS = 64  # of them, whatever the file says of their size


def _dig(record: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(record, dict) or part not in record:
            return _ABSENT
        record = record[part]
    return record


def compression(path: str) -> str | None:
    return COMPRESSED.get(PurePath(path).suffix)


def format_of(path: str) -> Format | None:
    """The format a file's name tells, compression left aside."""
    name = PurePath(path)
    return SUFFIXES.get(name.with_suffix("").suffix if compression(path) else name.suffix)


def read(piece: Piece, format: Format, fields: Fields) -> Iterator[str | object]:
    """The texts of a piece in order ("" for an empty one), with DAMAGED in place of each unreadable record.

    Raises ValueError for a record without the text field, and for a file that cannot be read to its end.
    """
    import pyarrow  # type: ignore[import-untyped]

    reader: Callable[[Piece, Fields], Iterator[str | object | None]] = _READERS[format]
    try:
        yield from (text for text in reader(piece, fields) if text is not None)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{piece.path} cannot be read to its end ({first_line(error)}); it is damaged or incomplete"
        ) from error


@contextmanager
def _open(path: str) -> Iterator[Any]:
    """The file's bytes, decompressed. Zstandard goes through Arrow: zstandard's own reader ends quietly where a file
    is cut off, and after the first frame of several."""
    if compression(path) != "zstd":
        with fsspec.open(path, "rb", compression=compression(path)) as stream:
            yield stream
        return
    import pyarrow

    with fsspec.open(path, "rb") as stream:
        yield io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))


def _jsonl(piece: Piece, fields: Fields) -> Iterator[str | object | None]:
    import orjson

    with _open(piece.path) as lines:
        position = piece.start
        if position:  # the line that is under way belongs to the piece before
            lines.seek(position - 1)
            position -= 1
            while rest := lines.readline(LONGEST):
                position += len(rest)
                if rest.endswith(b"\n"):
                    break
        while piece.stop is None or position < piece.stop:
            line = lines.readline(LONGEST)
            if not line:
                return
            start, position = position, position + len(line)
            if len(line) == LONGEST and not line.endswith(b"\n"):
                while rest := lines.readline(LONGEST):
                    position += len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield DAMAGED
                continue
            if line.isspace():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                yield DAMAGED
                continue
            yield fields.pick(record, f"the record at byte {start} of {piece.path}")


def _parquet(piece: Piece, fields: Fields) -> Iterator[str | object | None]:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    # Neither whole row groups nor those to come are held.
    streamed = {"pre_buffer": False, "buffer_size": 4 << 20}
    with fsspec.open(piece.path, "rb") as stream, parquet.ParquetFile(stream, **streamed) as table:
        columns = sorted(set(fields.columns()) & set(table.schema_arrow.names))
        if fields.text.split(".")[0] not in columns:
            fields.pick(dict.fromkeys(table.schema_arrow.names), f"parquet file {piece.path}")
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            mean = max(1, group.total_byte_size // max(1, group.num_rows))
            size = max(1, min(AT_ONCE // mean, MOST_ROWS))
            for batch in table.iter_batches(batch_size=size, row_groups=[number], columns=columns):
                yield from _rows(batch, fields, piece)


def _rows(batch: Any, fields: Fields, piece: Piece) -> Iterator[str | object | None]:
    """Of an Arrow batch; a row beyond ``LONGEST`` bytes counts as damaged."""
    parts = [batch] if batch.nbytes <= LONGEST else (batch.slice(row, 1) for row in range(len(batch)))
    for part in parts:
        if part.nbytes > LONGEST:
            yield DAMAGED
            continue
        for record in part.to_pylist():
            yield fields.pick(record, f"a row of {piece.path}")


def _datasets(piece: Piece, fields: Fields) -> Iterator[str | object | None]:
    """What ``Dataset.save_to_disk`` writes: Arrow streams."""
    import pyarrow

    with pyarrow.memory_map(piece.path) as stream, pyarrow.ipc.open_stream(stream) as table:
        for batch in table:
            batch.validate(full=True)  # Arrow believes a file's offsets, and reads beyond its end
            columns = [name for name in fields.columns() if name in batch.schema.names] or batch.schema.names
            yield from _rows(batch.select(columns), fields, piece)


def _text(piece: Piece, fields: Fields) -> Iterator[str | object | None]:
    """The whole file is one document."""
    with _open(piece.path) as stream:
        content = cast(bytes, stream.read(LONGEST + 1))
        if len(content) > LONGEST:
            raise ValueError(f"{piece.path} holds more than {LONGEST:,} bytes of text; cut it into several files")
        try:
            yield content.decode()
        except UnicodeDecodeError:
            yield DAMAGED


_READERS = {"jsonl": _jsonl, "parquet": _parquet, "text": _text, "datasets": _datasets}


def cut(text: str, longest: int | None) -> Iterator[str]:
    """``text`` in pieces of at most ``longest`` characters, cut after a blank line, a line or a space where one is."""
    while longest and len(text) > longest:
        end = longest
        for mark in ("\n\n", "\n", " "):
            if (found := text.rfind(mark, longest // 2, longest)) >= 0:
                end = found + len(mark)
                break
        yield text[:end]
        text = text[end:]
    yield text


def fingerprint(text: str) -> bytes:
    """16 bytes that two documents share only if their texts are equal."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def is_held_out(fingerprint: bytes, share: float) -> bool:
    """Whether a document is for evaluation: a function of its text alone, whatever file or domain it is in."""
    return int.from_bytes(fingerprint[:8], "little") < share * 2**64
