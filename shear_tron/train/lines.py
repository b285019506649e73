"""What lines of a run's logs hold, as types: a log may be of an older version, damaged, or anybody's.

What is checked is what somebody reads; of an older version, keys may be missing.
"""

from typing import Annotated, Any, Required

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # before Python 3.12 pydantic knows no other

from shear_tron.reading import short

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(gt=-1e300, lt=1e300)]  # sums of a few are numbers too
Seconds = Annotated[float, Field(ge=0, lt=1e11)]
Numbers = dict[str, Number]  # by domain
Losses = dict[str, Number | None]  # None: no number
Size = Annotated[int, Field(ge=1, le=2**40)]

_open = with_config(ConfigDict(extra="allow"))


@_open
class Layout(TypedDict):
    pp: Size
    replicate: Size
    shard: Size
    tp: Size


@_open
class Sizes(TypedDict):
    hidden: Size
    layers: Annotated[int, Field(ge=1, le=10_000)]
    heads: Size
    kv_heads: Size
    ffn: Size


@_open
class Run(TypedDict, total=False):
    """What runs where."""

    from_step: Required[Count]
    steps: Count
    versions: dict[str, str]
    commit: str | None
    device: str
    compute: str
    ranks: Size
    layout: Layout
    shape: Sizes
    parameters: Size
    target: Sizes | None
    target_parameters: Size | None


@_open
class Start(TypedDict, total=False):
    """The model before the first step."""

    step: Required[Count]
    held_out: Numbers


@_open
class Rewind(TypedDict):
    to: Count


@_open
class _Line(TypedDict, total=False):
    run: Run
    start: Start
    rewind: Rewind
    # a step
    step: Count
    tokens: Count
    loss: Number | None
    weights: Numbers
    held_out: Losses
    seconds: Seconds
    tokens_per_second: Number
    tflops_per_rank: Number
    peak_memory: Number
    time: Seconds
    multipliers: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)]]
    seconds_to_dense: Number
    flops_to_dense: Number


def _is_something(line: dict[str, Any]) -> dict[str, Any]:
    if not line.keys() & {"run", "start", "rewind", "step"}:
        raise ValueError("is neither a step nor a record of the run")
    for key, value in line.items():
        if key.startswith(("expected_", "target_")) and not (isinstance(value, int | float) and abs(value) < 1e300):
            raise ValueError(f"{short(key)} is no number")
    return line


@_open
class _Snapshot(TypedDict, total=False):
    """Chances of units, and (all but hidden and layers) of each layer's."""

    step: Required[Count]
    hidden: list[Number]
    layers: list[Number]
    kv_heads: list[list[Number]]
    heads_per_group: list[list[Number]]
    ffn: list[list[Number]]


class _Sample(TypedDict):
    prompt: str
    text: str


LINE: TypeAdapter[Any] = TypeAdapter(Annotated[_Line, AfterValidator(_is_something)])
SNAPSHOT: TypeAdapter[Any] = TypeAdapter(_Snapshot)
SAMPLE: TypeAdapter[Any] = TypeAdapter(_Sample)
REFERENCES: TypeAdapter[dict[str, float]] = TypeAdapter(Numbers)
