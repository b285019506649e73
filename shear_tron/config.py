"""Configurations: YAML files read into sections, which live with what they configure, and validated whole.

``load(RunConfig, "run.yaml", ["train.steps=100", "parallel.tp=2"])`` reads a file and lays ``section.key=value``
overrides over it. Unknown keys and wrong types are errors that name the nearest valid key.
"""

import difflib
import re
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shear_tron.files import write_atomically


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the rule and the fix."""


class Section(BaseModel):
    """A part of the configuration: immutable, with no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Config = TypeVar("Config", bound=BaseModel)


def load(kind: type[Config], path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read ``path`` (YAML) as a ``kind``, with ``section.key=value`` overrides. Raises ConfigError in one line."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read ({error.strerror}); give a path to a YAML file") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping of sections; see examples/")
    for override in overrides or []:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(kind, error)}") from None


def save(config: BaseModel, path: Path) -> None:
    """Write the resolved config, every default spelled out, as YAML."""
    write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


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


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is {inner!r}, not a section")
        values = inner
    try:
        values[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first problem in one line; for a misspelt key, the nearest valid one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        valid = _keys_at(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), valid, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {where!r}; {hint}valid keys here: {', '.join(valid)}{more}"
    if first["type"] == "missing":
        return f"{where} is missing; it has no default{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f"={first['input']!r}"
    return f"{where}{given}: {message}{more}"


def _keys_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the section at ``path``."""
    for part in path:
        field = kind.model_fields.get(str(part))
        section = _section(field.annotation) if field else None
        if section is not None:
            kind = section
    return list(kind.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None
