"""Typed reading of a config.json: every value checked, every complaint in one line that names file, key and fix."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shear_tron.reading import short

# Sizes beyond these are a damaged file's, and would only be found out after long allocations or loops.
MOST_LAYERS, LARGEST_SIZE, LONGEST_CONTEXT = 10_000, 2**24, 2**31


@dataclass(frozen=True)
class ConfigJson:
    """The values of one file.

    ``defaults``: of keys that the file leaves out. ``spelling``: what this file calls some keys; None: not at all.
    """

    path: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    spelling: Mapping[str, str | None] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        spelled = self.spelling.get(key, key)
        return self.defaults.get(key) if spelled is None else self.values.get(spelled, self.defaults.get(key))

    def size(self, key: str, null: int | None = None, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """A whole number from ``least`` to ``most``; where the value is null, ``null``."""
        value = self.get(key)
        value = null if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(f"{self.name(key)}={short(value)} is not a size; use a whole number")
        if not least <= value <= most:
            raise self.error(f"{self.name(key)}={value} is not a size; use a whole number from {least} to {most}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        value = self.defaults.get(key) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
            raise self.error(f"{self.name(key)}={short(value)} is not a positive number; set it")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise self.error(f"{self.name(key)}={short(value)} is neither true nor false; set it to one of them")
        return bool(value)

    def inner(self, key: str, **defaults: Any) -> "ConfigJson":
        """The object that is the value of ``key``; null and left out: empty."""
        value = self.get(key) or {}
        if not isinstance(value, dict):
            raise self.error(f"{key}={short(value)} is not an object; use one, or null")
        return ConfigJson(self.path, value, defaults)

    def name(self, key: str) -> str:
        return self.spelling.get(key, key) or key

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")
