"""Reading files that anyone may have written: bounded, and either a value or one line that says what is wrong.

Every function raises ValueError, with the file's name, for whatever it is given: a folder, a pipe, gigabytes, bytes
that are no text, nesting without end, aliases that unfold into billions, numbers that are none.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

LARGEST = 256 << 20  # bytes of any file read whole: a tokenizer or an index of the largest models has a tenth
LONGEST = 1 << 20  # characters of a YAML file
DEEPEST = 64  # levels of nesting
MOST = 100_000  # values in a YAML file
MOST_TOLD = 20  # problems told at once


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """The text of a file of at most ``largest`` bytes."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ValueError(f"{path} is {kind}; give the path of a text file")
        if status.st_size > largest:
            raise ValueError(f"{path} has {status.st_size:,} bytes, and no such file needs more than {largest:,}")
        with open(path, "rb") as file:
            return file.read(status.st_size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (at byte {error.start}); give a text file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None


def read_json(path: str | Path, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file. NaN and infinite numbers are none in JSON, and refused."""
    text = read_text(path, largest)
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({in_one_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def read_sentencepiece(path: str | Path) -> Any:
    """The library's model of a ``tokenizer.model``."""
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor()
    try:
        if not Path(path).is_file():
            raise ValueError("no regular file")
        library.load_from_serialized_proto(Path(path).read_bytes())
        if not library.vocab_size():
            raise ValueError("no tokens")
    except (RuntimeError, OSError, ValueError) as error:
        reason = in_one_line(error)
        raise ValueError(f"tokenizer={path} cannot be read ({reason}); use a SentencePiece model") from None
    return library


def is_file_name(name: str) -> bool:
    """Whether a file, of any folder, can be called so."""
    return PurePosixPath(name).name == name and name not in ("", "..") and name.isprintable() and len(name) <= 255


def require_files(folder: str | Path) -> None:
    """ValueError where a folder holds a pipe or a device, which a library that is let into it would wait for."""
    for entry in Path(folder).iterdir():
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"{entry} is no regular file; remove it")


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML ``text`` spells, without aliases; ``where`` it is from, for errors."""
    try:
        _require_small(text)
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(f"{where} is not YAML: {in_one_line(error)}") from None


def short(value: object, most: int = 60) -> str:
    """``repr(value)``, cut where it is long; a large value is not written out to be cut."""
    if isinstance(value, str | bytes):
        text = repr(value[: most + 1])
    elif isinstance(value, dict | list | tuple | set):
        text = f"{type(value).__name__} of {len(value)}" if len(value) > 8 or _nested(value) else repr(value)
    elif isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    else:
        text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def explain(error: ValidationError, spelling: Mapping[str, str | None] | None = None) -> str:
    """Everything that is wrong with a value, in one line. ``spelling``: what its file calls some of the first keys."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        first, *rest = problem["loc"] or ("",)
        key = " ".join(".".join(map(str, [(spelling or {}).get(str(first), first), *rest])).split())
        where = key if len(key) <= 100 else short(key, 100)
        found.setdefault(where, said(where, problem))
    return listed(list(found.values()))


def said(where: str, problem: Any) -> str:
    """One of pydantic's problems, at a key."""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where}"
    if problem["type"] == "missing":
        return f"{where} is missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f"={short(problem['input'])}"
    return f"{where}{given}: {message}" if where else message


def listed(problems: Sequence[str]) -> str:
    """Problems in one line, numbered where there are several."""
    if len(problems) == 1:
        return problems[0]
    told = [f"({number}) {text}" for number, text in enumerate(problems[:MOST_TOLD], 1)]
    more = [f"and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
    return f"{len(problems)} problems: " + "; ".join(told + more)


def in_one_line(error: BaseException) -> str:
    """What an error of anybody's says, in one line and not at length."""
    if isinstance(error, ValidationError):
        return explain(error)
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: BaseException) -> str:
    """What an error of a library says before it explains itself, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _nested(value: dict[Any, Any] | list[Any] | tuple[Any, ...] | set[Any]) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    long = (isinstance(each, str | bytes) and len(each) > 60 for each in inner)
    return any(long) or any(isinstance(each, dict | list | tuple | set) for each in inner)


def _require_small(text: str) -> None:
    if len(text) > LONGEST:
        raise ValueError(f"more than {LONGEST:,} characters")
    depth = values = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"an alias (*{event.anchor}) in line {line}; write the value out")
        values += isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels in line {line}")
        if values > MOST:
            raise ValueError(f"more than {MOST:,} values")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond any number")
    return number


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and `no` as a word, as YAML 1.2 and everybody's expectation have it."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$", re.IGNORECASE), list("tTfF"))

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)
