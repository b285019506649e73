"""The table of devices, which anybody can edit."""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

TABLE = Path(__file__).with_name("devices.yaml")


@dataclass(frozen=True)
class Device:
    """One GPU and the ways out of it: bytes, FLOP/s, bytes/s."""

    name: str
    memory: float
    peak: float  # dense 16-bit matrix FLOP/s of the data sheet: what MFU is a share of
    products: float  # FLOP/s that large matrix products reach
    attention: float  # FLOP/s that attention reaches, forward and backward together
    bandwidth: float  # bytes/s of its memory
    within_node: float  # bus bandwidth of collectives between GPUs of a node
    between_nodes: float  # and between nodes, per GPU
    hop: float  # seconds that each further rank adds to a collective
    per_node: int


def device(name: str, table: str | None = None, per_node: int | None = None) -> Device:
    """The device called ``name`` in ``table`` (default: ours). Raises ValueError where it is not there or not whole."""
    path = Path(table) if table else TABLE
    try:
        rows = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"table of devices {path} cannot be read ({' '.join(str(error).split())})") from None
    if name not in rows:
        raise ValueError(f"--gpu={name} is not in {path}; use one of {', '.join(rows)}, or add a line to a copy of it")
    needed = [field.name for field in fields(Device) if field.name != "name"]
    if absent := [key for key in needed if key not in rows[name]]:
        raise ValueError(f"{path}: {name} lacks {', '.join(absent)}")
    values = {key: float(rows[name][key]) for key in needed} | {"per_node": int(rows[name]["per_node"])}
    return Device(name, **(values | ({"per_node": per_node} if per_node else {})))  # type: ignore[arg-type]
