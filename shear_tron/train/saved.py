"""What a trainer saves beside tensors, as types: a checkpoint may be of another version."""

from pathlib import Path
from typing import NotRequired

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from shear_tron.checkpoint import sharded
from shear_tron.reading import in_one_line
from shear_tron.train.lines import Count, Number, Numbers

_open = with_config(ConfigDict(extra="allow"))


@_open
class _Health(TypedDict):
    skipped: Count
    skipped_in_a_row: Count


@_open
class _Sampler(TypedDict):
    seed: int
    sequence: Count
    number: Count
    drawn: dict[str, Count]
    windows: dict[str, Count]


@_open
class _Mixture(TypedDict):
    weights: Numbers
    start: Numbers
    memory: Numbers


@_open
class _State(TypedDict):
    updates_before: Count
    health: _Health
    losses: NotRequired[list[Number]]
    sampler: _Sampler
    mixture: _Mixture
    references: Numbers


def progress(checkpoint: Path) -> sharded.Progress:
    """``sharded.progress`` of a trainer's checkpoint. ValueError where its state is none that this version reads."""
    found = sharded.progress(checkpoint)
    try:
        TypeAdapter(_State).validate_python(found.state, strict=True)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint / sharded.PROGRESS} is of another version of shear-tron ({in_one_line(error)}); go on with "
            "that one, or begin a new run"
        ) from None
    return found
