"""Whose folder it is: a run goes on in its own folder only, one process at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.remote import Remote, fetch_latest
from shear_tron.config import ConfigError
from shear_tron.config import save as save_config
from shear_tron.files import write_atomically
from shear_tron.parallel.agree import require_all
from shear_tron.parallel.topology import Topology
from shear_tron.reading import parse_yaml, read_text, short
from shear_tron.train.config import RunConfig
from shear_tron.train.run_folder import CONFIG

LOCK, UNTIL = ".lock", "config.until-step-{}.yaml"

# Keys in which a run may differ from the config saved in its folder when it goes on: they change no number of it.
MAY_CHANGE = (
    "run", "parallel", "train.steps", "train.device", "train.activation_checkpointing", "train.compile",
    "train.log_every", "train.max_skipped", "checkpoint", "prune.compact", "prune.pad_to",
    "data.evaluate_every", "data.verify", "log",
)  # fmt: skip
# Keys that may change on purpose, with --allow-change: what comes after is another run from there on.
ON_PURPOSE = (
    "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.min_learning_rate", "optimizer.weight_decay",
    "optimizer.betas", "optimizer.eps", "optimizer.clip", "optimizer.schedule", "train.micro_batch",
    "train.precision", "train.rewind_above", "data.weights", "data.mixture", "data.update_every",
    "data.evaluate_windows", "prune.learning_rate",
)  # fmt: skip


def claim_run_folder(config: RunConfig, allowed: tuple[str, ...] = ()) -> list[str]:
    """Check that the run's folder is free or holds an earlier part of this very run.

    allowed: keys, or sections, that may change on purpose. Returns those that did. Raises ConfigError in one line.
    """
    run = Path(config.run)
    _require_own_folder(config)
    for key in allowed:
        if not _within(key, ON_PURPOSE):
            raise ConfigError(f"--allow-change {key}: only {', '.join(ON_PURPOSE)} may change in a run that goes on")
    newest = sharded.latest(run)
    if newest is None:
        return []  # nothing to go on from: a run that ended before its first checkpoint binds nobody
    before, now = _saved(_config_of(run, sharded.step_of(newest))), config.model_dump(mode="json")
    changed = []
    for key in _differences(before, now):
        if _within(key, MAY_CHANGE):
            continue
        if not _within(key, allowed):
            named = " ".join(key.split())[:100]
            fix = f"--allow-change {named}" if _within(key, ON_PURPOSE) else "choose another run folder"
            was, is_now = short(_at(before, key)), short(_at(now, key))
            raise ConfigError(
                f"{config.run} holds a run with another {named} ({was}, now {is_now}); {fix}, or delete this one"
            )
        changed.append(key)
    return changed


def fetch_copy(config: RunConfig) -> int | None:
    """Where the run's folder has no checkpoint, bring the newest from ``checkpoint.upload``. Returns its step.

    Raises ValueError in one line.
    """
    if config.checkpoint.upload is None:
        return None
    _require_own_folder(config)
    remote = Remote(config.checkpoint.upload)
    if remote.is_folder(Path(config.run)):
        raise ConfigError(f"checkpoint.upload={config.checkpoint.upload} is the run's own folder; give another place")
    return fetch_latest(remote, Path(config.run))


@contextmanager
def claimed(config: RunConfig, topology: Topology) -> Iterator[None]:
    """Keep the run's folder to this run, on all ranks; AgreedError where another process has it.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    descriptor, problem = -1, None
    if topology.is_main:
        try:
            descriptor = _lock(Path(config.run))
        except (ValueError, OSError) as error:
            problem = str(error)
    try:
        require_all(problem)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def record_config(config: RunConfig, step: int) -> None:
    """Write the config, and keep the one that made the checkpoint of ``step`` if they differ in more than free keys.

    Those kept at later steps go, as lines of the log do: their checkpoints are gone, others will have their names.
    """
    run = Path(config.run)
    made, kept = _config_of(run, step), run / UNTIL.format(f"{step:08d}")
    if step and made != kept and made.exists():
        before = _saved(made)
        if any(not _within(key, MAY_CHANGE) for key in _differences(before, config.model_dump(mode="json"))):
            write_atomically(kept, made.read_bytes())
    save_config(config, run / CONFIG)
    for later in _kept_from(run, step + 1):
        later.unlink()


def _kept_from(run: Path, step: int) -> list[Path]:
    """Configs that were kept at that step or later, in order."""
    return sorted(file for file in run.glob(UNTIL.format("*")) if file.name >= UNTIL.format(f"{step:08d}"))


def _config_of(run: Path, step: int) -> Path:
    """The config that made the checkpoint of a step: not one of later steps, nor one that came to no checkpoint."""
    return next(iter(_kept_from(run, step)), run / CONFIG)


def _require_own_folder(config: RunConfig) -> None:
    """A run writes, replaces and deletes in its folder: it must not be somebody else's."""
    if not config.run.strip():
        raise ConfigError("run is empty; give a folder of its own for this run")
    run = Path(config.run).resolve()
    for key, folder in (("model", config.model), ("data.folder", config.data.folder)):
        if run == Path(folder).resolve():
            raise ConfigError(f"run={config.run} is {key} too; give a folder of its own for this run")
    if run.exists() and not run.is_dir():
        raise ConfigError(f"run={config.run} is a file; give a folder of its own for this run")


def _lock(run: Path) -> int:
    """Lock a run's folder. ValueError where another process has it."""
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise ValueError(
            f"{run} is in use by another process ({holder or 'unknown'}); wait for it, or choose another run folder"
        ) from None
    except OSError:  # a file system without locks: better unlocked than unusable
        pass
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _saved(file: Path) -> dict[str, object]:
    try:
        content = parse_yaml(read_text(file), str(file))
        if isinstance(content, dict):
            return content
        raise ValueError(f"{file} holds {type(content).__name__}, not a config")
    except ValueError as error:
        raise ConfigError(f"{error}, though there are checkpoints beside it; restore it") from None


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _differences(before: object, now: object, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict) and prefix not in ("data.weights", "data.reference_losses"):
        keys = [*now, *(key for key in before if key not in now)]
        dot = prefix + "." if prefix else ""
        return [found for key in keys for found in _differences(before.get(key), now.get(key), f"{dot}{key}")]
    return [] if before == now else [prefix]


def _at(values: object, key: str) -> object:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
