"""A run's numbers in other programs: TensorBoard and Weights & Biases, each through its own library."""

import uuid
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from shear_tron.config import ConfigError
from shear_tron.reading import read_text
from shear_tron.train.config import LogConfig, RunConfig

WANDB_ID = "wandb_id"  # names the file in the run's folder: a resumed run goes on in the same graphs


class Viewer(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def require(config: LogConfig) -> None:
    """Raise ConfigError in one line where a viewer's library is not installed."""
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        if wanted and find_spec(package) is None:
            raise ConfigError(f"log.{package} needs {package}; pip install 'shear-tron[{package}]', or leave it out")


def viewers(run: Path, first: int, config: RunConfig) -> list[Viewer]:
    """Those that ``config.log`` asks for, going on after step ``first``."""
    found: list[Viewer] = []
    if config.log.tensorboard:
        found.append(TensorBoard(run, first))
    if config.log.wandb:
        found.append(WandB(run, config.log.wandb, config))
    return found


class TensorBoard:
    """Event files in the run's folder; steps after ``first`` that earlier files hold are hidden: undone."""

    def __init__(self, run: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(run), purge_step=first + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One run at Weights & Biases for one folder, however often it is resumed. Graphs are over ``step``."""

    def __init__(self, run: Path, project: str, config: RunConfig) -> None:
        import wandb

        remembered = run / WANDB_ID
        if not remembered.exists():
            remembered.write_text(uuid.uuid4().hex)
        self.run: Any = wandb.init(
            project=project,
            name=run.resolve().name,
            id=read_text(remembered),
            resume="allow",
            dir=str(run),
            config=config.model_dump(mode="json"),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


def numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of all finite numbers of a log line; what is nested is named ``held_out/wiki``, lists by place."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            yield from numbers({str(place): inner for place, inner in enumerate(value)}, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            yield f"{prefix}{key}", value
