"""The folder of a run that has been trained: its config, one of its checkpoints, and where its inputs are now."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.model_folder import read_architecture
from shear_tron.config import load
from shear_tron.hub import located
from shear_tron.train.config import RunConfig

CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunFolder:
    """``model``: the folder of the model that the run was trained from; ``tokenizer``: that of its tokenizer."""

    path: Path
    config: RunConfig
    checkpoint: Path
    model: Path
    tokenizer: Path

    @classmethod
    def open(
        cls, path: str | Path, step: int | None = None, model: str | None = None, tokenizer: str | None = None
    ) -> Self:
        """step: a checkpoint's, None for the newest. model, tokenizer: where they are, None for where they were.

        Raises ValueError for a folder that is no run, has no such checkpoint, or whose model or tokenizer is gone.
        """
        path = Path(path)
        if not (path / CONFIG).exists():
            raise ValueError(f"{path} is no run folder (it has no {CONFIG}); give the `run` of a training")
        checkpoint = sharded.latest(path) if step is None else sharded.path(path, step)
        if checkpoint is None or not checkpoint.exists():
            have = ", ".join(found.name for found in sharded.checkpoints(path)) or "none"
            wanted = "" if step is None else f" of step {step}"
            raise ValueError(f"{path} has no checkpoint{wanted}; it has {have}")
        config = load(RunConfig, path / CONFIG)
        source = Path(located(model)) if model else _now(config.model, path, config)
        if not source.exists():
            raise ValueError(f"{source}, which {path} was trained from, is not there; say where it is with --model")
        words = source
        if tokenizer or config.tokenizer:
            words = Path(located(tokenizer)) if tokenizer else _now(str(config.tokenizer), path, config)
        if not words.exists():
            raise ValueError(f"{words}, the tokenizer of {path}, is not there; say where it is with --tokenizer")
        return cls(path, config, checkpoint, source, words.parent if words.is_file() else words)

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return int(self.checkpoint.name.removeprefix("step-"))

    @property
    def source(self) -> Architecture:
        """What the run trained."""
        return self.config.source(read_architecture(self.model))

    @property
    def data(self) -> Path:
        """The folder of prepared data."""
        return _now(self.config.data.folder, self.path, self.config)


def _now(given: str, run: Path, config: RunConfig) -> Path:
    """Where a path of a run's saved config is; what came from the Hub is in its cache.

    A relative path counts from where the run was started: from here if it is there, else from the folder in which
    ``config.run`` is ``run``. So a run exports from anywhere, and after it and its inputs moved together.
    """
    given = located(given, fetch=False)
    here, was = run.resolve(), Path(config.run)
    relative = not Path(given).is_absolute() and not was.is_absolute()
    if relative and not Path(given).exists() and here.parts[-len(was.parts) :] == was.parts:
        return Path(*here.parts[: -len(was.parts)], given)
    return Path(given)
