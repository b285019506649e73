"""From a domain's path to tasks: which files, cut where, under which key."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field

from shear_tron.data.documents import SUFFIXES, Fields, Format, Piece, compression, format_of
from shear_tron.data.shards import Task
from shear_tron.reading import LARGEST


class DomainSource(BaseModel):
    """Where a domain's documents are.

    ``path`` is a file, a folder (read recursively) or a pattern ("dolma/c4-*.json.gz"), local or a URL of fsspec.
    ``text`` names the record's text field, ``where`` the fields a record must have to count, as in
    ``{"meta.redpajama_set_name": "RedPajamaC4"}``; dots reach into nested records.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str  # a file, a folder (read recursively) or a pattern; local or a URL of fsspec
    format: Literal["auto", "jsonl", "parquet", "text", "datasets"] = "auto"  # auto: by the files' names
    text: str = "text"  # the record's field that holds the text; dots reach into nested records
    where: dict[str, str] = {}  # fields and values that a record must have to count
    # at most so many documents, counted before duplicates and held-out ones are taken out
    limit: int | None = Field(default=None, gt=0)
    cut: int | None = Field(default=None, gt=0)  # longer documents become several of at most this many characters
    held_out: float | None = Field(default=None, ge=0, lt=1)  # share for this domain; small domains need more
    licence: str = ""  # a note for the manifest


def plan(name: str, source: DomainSource, held_out: float, piece_bytes: int, settings: dict[str, Any]) -> list[Task]:
    """The tasks of a domain in reading order. Plain jsonl files are cut into pieces of ``piece_bytes``.

    A task's key hashes its input's name, size and time stamp with ``settings``, so tasks of unchanged files keep their
    keys when others are added. Raises ValueError for a path that holds nothing to read, or files of several formats.
    """
    files, root = _files(name, source)
    format = _format(name, source, [path for path, _, _ in files])
    pieces = [
        (Piece(path, start, stop), (_relative(path, root), size, stamp, start, stop), (stop or size) - start)
        for path, size, stamp in files
        for start, stop in _cuts(path, size, format, piece_bytes)
    ]
    # A limit counts documents over all files, so they must be read by one task.
    groups = [pieces] if source.limit else [[piece] for piece in pieces]
    share = held_out if source.held_out is None else source.held_out
    reading = source.model_dump(exclude={"path", "licence"}) | {"held_out": share}
    return [
        Task(
            domain=name,
            key=_hash([name, settings, reading, [identity for _, identity, _ in group]]),
            pieces=tuple(piece for piece, _, _ in group),
            format=format,
            fields=Fields(source.text, tuple(source.where.items())),
            cut=source.cut,
            limit=source.limit,
            held_out=share,
            bytes=sum(size for _, _, size in group),
        )
        for group in groups
    ]


def require_outside(output: str, name: str, source: DomainSource) -> None:
    """ValueError where what is written into ``output`` would be read as text of a domain the next time."""
    folder = Path(source.path)
    if folder.is_dir() and Path(output).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output={output} is inside domain {name!r}, path={source.path}; write somewhere else")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _cuts(path: str, size: int, format: Format, piece_bytes: int) -> Iterator[tuple[int, int | None]]:
    if format != "jsonl" or compression(path) or size <= piece_bytes:
        yield 0, None
        return
    for start in range(0, size, piece_bytes):
        yield start, min(start + piece_bytes, size)


def _files(name: str, source: DomainSource) -> tuple[list[tuple[str, int, str]], str]:
    """(path, bytes, time stamp) of each input file, sorted, and the folder they are in."""
    system, path = fsspec.core.url_to_fs(source.path)
    if any(mark in path for mark in "*?["):
        paths, root = system.glob(path), ""
    elif system.isdir(path):
        paths, root = _folder(name, system, path), path
    elif system.exists(path):
        paths, root = [path], path.rsplit("/", 1)[0]
    else:
        raise ValueError(f"domain {name!r}: path={source.path} does not exist; give a file, a folder or a pattern")
    chosen = sorted(
        path
        for path in paths
        if not any(part.startswith((".", "_")) for part in PurePath(_relative(path, root)).parts)
        and system.isfile(path)
        and (source.format == "text" or len(paths) == 1 or format_of(path) is not None)
    )
    if not chosen:
        raise ValueError(
            f"domain {name!r}: path={source.path} holds nothing to read; it needs {', '.join(SUFFIXES)} files"
        )
    infos = [system.info(path) for path in chosen]
    stamps = [str(info.get("mtime") or info.get("ETag") or info.get("LastModified") or "") for info in infos]
    full = [system.unstrip_protocol(path).removeprefix("file://") for path in chosen]
    return [(path, int(info["size"]), stamp) for path, info, stamp in zip(full, infos, stamps, strict=True)], root


def _folder(name: str, system: Any, path: str) -> list[str]:
    """Files below a folder; of a saved Hugging Face dataset only its data, not what its cache left there."""
    if system.isfile(f"{path}/dataset_dict.json"):
        splits = _values(system, f"{path}/dataset_dict.json", "splits", str)
        told = ", ".join(splits)[:200]
        raise ValueError(f"domain {name!r}: path={path} holds the splits {told}; give one, {path}/{splits[0][:60]}")
    if system.isfile(f"{path}/state.json"):
        files = _values(system, f"{path}/state.json", "_data_files", dict)
        return [f"{path}/{PurePath(str(file.get('filename'))).name}" for file in files]
    return list(system.find(path))


def _values(system: Any, file: str, key: str, kind: type[Any]) -> list[Any]:
    """The list of ``kind`` under ``key`` of a JSON file. ValueError where there is none."""
    try:
        found = json.loads(system.cat_file(file, end=LARGEST)).get(key)
    except (ValueError, AttributeError, RecursionError, OSError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(each, kind) for each in found):
        raise ValueError(f"{file} has no list of {key}; save the dataset again")
    return found


def _format(name: str, source: DomainSource, paths: list[str]) -> Format:
    if source.format != "auto":
        return source.format
    found = {format_of(path) for path in paths} - {None}
    if len(found) != 1:
        what = ", ".join(sorted(str(format) for format in found)) or "files of unknown format"
        raise ValueError(f"domain {name!r}: path={source.path} holds {what}; set format to the one to read")
    (format,) = found
    assert format is not None
    return format
