"""The table of devices, which anybody can edit."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter

from shear_tron.reading import in_one_line, parse_yaml, read_text

TABLE = Path(__file__).with_name("devices.yaml")


Rate = Annotated[float, Field(gt=0, lt=1e30)]


@dataclass(frozen=True)
class Device:
    """One GPU and the ways out of it: bytes, FLOP/s, bytes/s."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    name: str
    memory: Rate
    peak: Rate  # dense 16-bit matrix FLOP/s of the data sheet: what MFU is a share of
    products: Rate  # FLOP/s that large matrix products reach
    attention: Rate  # FLOP/s that attention reaches, forward and backward together
    bandwidth: Rate  # bytes/s of its memory
    within_node: Rate  # bus bandwidth of collectives between GPUs of a node
    between_nodes: Rate  # and between nodes, per GPU
    hop: Annotated[float, Field(ge=0, lt=1e30)]  # seconds that each further rank adds to a collective
    per_node: PositiveInt


_ROWS = TypeAdapter(dict[str, dict[str, Any]])
_DEVICE = TypeAdapter(Device)


def device(name: str, table: str | None = None, per_node: int | None = None) -> Device:
    """The device called ``name`` in ``table`` (default: ours). Raises ValueError where it is not there or not whole."""
    path = Path(table) if table else TABLE
    try:
        rows = _ROWS.validate_python(parse_yaml(read_text(path), str(path)))
    except ValueError as error:
        raise ValueError(f"table of devices {path} cannot be read ({in_one_line(error)})") from None
    if name not in rows:
        raise ValueError(f"--gpu={name} is not in {path}; use one of {', '.join(rows)}, or add a line to a copy of it")
    try:
        found = _DEVICE.validate_python({**rows[name], "name": name})
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {in_one_line(error)}") from None
    return replace(found, per_node=per_node) if per_node else found
