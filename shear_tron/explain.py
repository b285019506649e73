"""What every key of a configuration means, read from where it is defined.

A key's explanation is the comment beside its field (or above it) in the section's source, its type and default are the
field's own. ``shear-tron config`` prints them, docs/config.md is made of them, and so there is nothing to keep in step.
"""

import difflib
import inspect
import io
import pkgutil
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shear_tron.config import ConfigError

# What a YAML file can be, by the verb that reads it. Imported when asked for: preparing data brings datatrove along.
FILES = {
    "train": "shear_tron.train.config:RunConfig",
    "prepare": "shear_tron.data.prepare:PrepareConfig",
    "reference-loss": "shear_tron.use.reference:ReferenceConfig",
}


@dataclass(frozen=True)
class Key:
    """One key: its full name, what it takes, what it is where left out (None: it must be given), what it means."""

    name: str
    takes: str
    default: str | None
    meaning: str
    section: type[BaseModel] | None  # where its value is a section of its own


def keys(kind: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys of a configuration in the order of their definition, those of sections after their section's."""
    lineage = [base for base in reversed(kind.__mro__) if issubclass(base, BaseModel) and base is not BaseModel]
    comments = {name: text for base in lineage for name, text in _comments(base).items()}
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        meaning = comments.get(name) or (_first_paragraph(section) if section else "")
        default = None if field.is_required() else _default(field, section)
        key = Key(prefix + name, _takes(field.annotation, field.metadata), default, meaning, section)
        yield key
        if section is not None:
            inner = ".NAME." if typing.get_origin(field.annotation) is dict else "."
            yield from keys(section, prefix + name + inner)


def explain(key: str) -> str:
    """The keys that ``key`` names, one or a section's, explained. Raises ConfigError with the nearest key.

    ``key`` is of a run's config (``train.steps``) or begins with another file's verb (``prepare.domains``).
    """
    verb, _, rest = key.partition(".")
    if verb not in FILES or verb == "train":  # which is also a section
        verb, rest = "train", key
    found = list(keys(pkgutil.resolve_name(FILES[verb])))
    chosen = [entry for entry in found if not rest or entry.name == rest or entry.name.startswith(rest + ".")]
    if not chosen:
        near = difflib.get_close_matches(rest, [entry.name for entry in found], n=1, cutoff=0.0)
        raise ConfigError(f"no key {rest!r} in the config of `{verb}`; the nearest is {near[0]!r}")
    text = "\n".join(_lines(entry) for entry in chosen)
    others = " and ".join(f"`shear-tron config {name}`" for name in [*FILES][1:])
    return text if key else f"{text}\n\nThese are a run's keys; {others} explain other files."


def markdown() -> str:
    """docs/config.md."""
    lines = [
        "# Every key",
        "",
        "Made by `shear-tron config --markdown > docs/config.md`; do not edit (a test compares). On the command line",
        "`shear-tron config train.steps` explains a key and `shear-tron config prune` a section.",
        "Any key can be overridden as `section.key=value` after the file's name. One without a default must be given.",
    ]
    for verb, kind in FILES.items():
        lines += ["", f"## The file of `shear-tron {verb}`", "", *_table(pkgutil.resolve_name(kind))]
    return "\n".join(lines)


def _table(kind: type[BaseModel]) -> list[str]:
    lines = ["| key | takes | default | |", "|---|---|---|---|"]
    for key in keys(kind):
        name = f"**`{key.name}`**" if key.section else f"`{key.name}`"
        default = "" if key.default is None else f"`{key.default}`" if key.default else '`""`'
        cells = (name, key.takes, default, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _lines(key: Key) -> str:
    default = "required" if key.default is None else f"default {key.default or repr('')}"
    text = textwrap.fill(key.meaning, 100, initial_indent="    ", subsequent_indent="    ")
    return f"{key.name}: {key.takes}; {default}\n{text}"


def _comments(kind: type[BaseModel]) -> dict[str, str]:
    """The comment beside each field of a section, or else the ones above it, from the source."""
    source = textwrap.dedent(inspect.getsource(kind))
    found: dict[str, str] = {}
    above: list[str] = []
    field = ""
    starts = True  # whether the next token begins a statement of the class body
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.INDENT:
            depth += 1
        elif token.type == tokenize.DEDENT:
            depth -= 1
        elif token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if starts:
                above.append(text)
            elif field:
                found[field] = " ".join(filter(None, (found.get(field), text)))
        elif token.type == tokenize.NEWLINE:
            starts, field = True, ""
        elif starts and token.type != tokenize.NL:
            starts = False
            field = token.string if depth == 1 and token.string in kind.model_fields else ""
            if field and above:
                found[field] = " ".join(above)
            above = []
    return found


def _first_paragraph(kind: type[BaseModel]) -> str:
    text = inspect.cleandoc(kind.__doc__ or "")
    return " ".join(text.split("\n\n")[0].split())


def _section(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.default_factory is not None:
        return "found out"
    value = field.default
    if isinstance(value, BaseModel):
        return "its keys' own"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", types.NoneType: ""}


def _takes(annotation: Any, rules: list[Any]) -> str:
    """A type in words, with its bounds."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _takes(inside[0], [*inside[1:], *rules])
    if origin is typing.Literal:
        return " | ".join(str(option) for option in inside)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, (_takes(option, []) for option in inside))) + _bounds(rules)
    if origin is dict:
        return f"{{name: {_takes(inside[1], [])}}}"
    if origin in (tuple, list):
        return f"[{', '.join(_takes(option, []) for option in inside if option is not Ellipsis)}]"
    if annotation is Any:
        return "anything"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _WORDS.get(annotation, str(annotation)) + _bounds(rules)


def _bounds(rules: list[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    said = [f"{sign} {getattr(rule, name):g}" for rule in rules for name, sign in signs.items() if hasattr(rule, name)]
    return f" {', '.join(said)}" if said else ""
