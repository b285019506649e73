"""Configurations: YAML files read into sections, which live with what they configure, and validated whole.

``load(RunConfig, "run.yaml", ["train.steps=100", "parallel.tp=2"])`` reads a file and lays ``section.key=value``
overrides over it. Unknown keys and wrong types are errors that name the nearest valid key.
"""

import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shear_tron.files import write_atomically
from shear_tron.reading import LONGEST, listed, parse_yaml, read_text, said, short


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the rule and the fix."""


class Problems(list[str]):
    """What checks find that need not wait for each other, told at once: ``with problems: check()``."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, ValueError):
            self.append(str(error))
        return isinstance(error, ValueError)

    def tell(self) -> None:
        """Raise ConfigError if there are any."""
        if self:
            raise ConfigError(listed(self))


class Section(BaseModel):
    """A part of the configuration: immutable, with no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Config = TypeVar("Config", bound=BaseModel)


def load(kind: type[Config], path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read ``path`` (YAML) as a ``kind``, with ``section.key=value`` overrides. Raises ConfigError in one line."""
    try:
        values = parse_yaml(read_text(path, LONGEST), str(path))
    except ValueError as error:
        raise ConfigError(f"config file {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping of sections; see examples/")
    for override in overrides or []:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(kind, error, values)}") from None


def save(config: BaseModel, path: Path) -> None:
    """Write the resolved config, every default spelled out, as YAML."""
    write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {short(override)} is not of the form section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {short(override)}: {section} is {short(inner)}, not a section")
        values = inner
    try:
        values[last] = parse_yaml(text, "the value")
    except ValueError as error:
        raise ConfigError(f"override {short(override)}: {error}; quote it") from None


def _explain(kind: type[BaseModel], error: ValidationError, values: dict[str, Any]) -> str:
    """Every problem, one for each key."""
    found: dict[str, str] = {}
    for problem in error.errors():
        keys = _keys_of(problem["loc"], values)
        where = ".".join(keys)
        if any(key == where or key.startswith(f"{where}.") for key in found):
            continue  # the same value as another kind that the key may have
        found[where] = _say(kind, keys, where, problem)
    return listed(list(found.values()))


def _keys_of(location: tuple[int | str, ...], values: Any) -> list[str]:
    """The keys that lead to a problem; pydantic puts names of types between them."""
    keys = []
    for place, part in enumerate(location):
        inner: dict[Any, Any] = dict(enumerate(values)) if isinstance(values, list) else values
        is_last = place + 1 == len(location)
        if not isinstance(inner, dict) or (part not in inner and not is_last):
            continue
        keys.append(str(part))
        values = inner.get(part)
    return keys


def _say(kind: type[BaseModel], keys: list[str], where: str, problem: Any) -> str:
    """A problem in one line; for a misspelt key, the nearest valid one."""
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(kind, tuple(keys[:-1]))
        near = difflib.get_close_matches(keys[-1][:60], valid, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {short(where)}; {hint}valid keys here: {', '.join(valid)}"
    return said(where, problem)


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
