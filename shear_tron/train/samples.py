"""Where in its data a run begins: the starting mixture, and the first sample."""

from collections.abc import Sequence
from pathlib import Path

from shear_tron.checkpoint import sharded
from shear_tron.config import ConfigError, load
from shear_tron.data.manifest import Manifest
from shear_tron.data.sampler import Sampler
from shear_tron.train import saved
from shear_tron.train.config import RunConfig
from shear_tron.train.run_folder import CONFIG


def mixture_of(config: RunConfig, manifest: Manifest) -> dict[str, float]:
    """Starting weights by domain, of domains that can be trained on and evaluated. Raises ValueError in one line."""
    mixture = _mixture(config.data.weights, manifest)
    manifest.require(tuple(mixture))
    for name in mixture:
        _require_held_out(manifest, name, config.data.sequence)
    return mixture


def sampler_of(config: RunConfig, manifest: Manifest, names: Sequence[str]) -> Sampler:
    """Of the run's samples from its first: after those of ``data.after``. Raises ValueError in one line."""
    sampler = Sampler(manifest, names, config.data.sequence, config.train.seed)
    if after := config.data.after:
        ended = _ended("data.after", after, "leave it out")
        try:
            sampler.restore(ended.state["sampler"])
        except ValueError as error:
            raise ConfigError(f"data.after={after}: {error}, or leave data.after out") from None
    return sampler


def _mixture(given: dict[str, float] | str, manifest: Manifest) -> dict[str, float]:
    """Starting weights by domain."""
    if not isinstance(given, str):
        return given
    if given == "proportional":
        return {name: float(manifest.domain(name).tokens()) for name in manifest.domains}
    ended = _ended("data.weights", given, "give a weight for each domain, or `proportional`")
    return dict(ended.state["mixture"]["weights"])


def _ended(key: str, run: str, instead: str) -> sharded.Progress:
    """What the run of ``key`` was at its end. ConfigError where it has not ended."""
    folder, options = Path(run), f"give the folder of a finished run, or {instead}"
    checkpoint = sharded.latest(folder)
    if checkpoint is None or not (folder / CONFIG).exists():
        state = "holds no run with a checkpoint" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"{key}={run} {state}; {options}")
    progress, steps = saved.progress(checkpoint), load(RunConfig, folder / CONFIG).train.steps
    if progress.step < steps:
        raise ConfigError(
            f"{key}={run} is a run that stopped at step {progress.step} of {steps}, where it will end is not known; "
            f"finish it, or {options}"
        )
    return progress


def _require_held_out(manifest: Manifest, name: str, sequence: int) -> None:
    tokens = manifest.domain(name).tokens("held_out")
    if tokens <= sequence:
        raise ConfigError(
            f"domain {name!r} of {manifest.folder} has {tokens} held-out tokens, less than one window of data.sequence="
            f"{sequence} plus 1; prepare it with a larger held_out, use a shorter sequence, or leave the domain out"
        )
