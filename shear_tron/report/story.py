"""What runs have written in their folders, as one story: stage after stage, tokens counted from the beginning."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from shear_tron.config import ConfigError
from shear_tron.reading import in_one_line, parse_yaml, read_text
from shear_tron.report.units import SPARSITIES
from shear_tron.train import metrics
from shear_tron.train.lines import SAMPLE, Number, Size

TOLERANCE = 0.05  # a kind whose expected sparsity ends further than this from the target's has missed it, as for train
POINTS = 800  # of a curve: more are more than a screen has columns
PER_LAYER = ("layers", "kv_heads", "heads_per_group", "ffn")  # in a snapshot of gates
SAMPLES = "samples.jsonl"  # lines of {"prompt", "text"}, if somebody recorded any

Losses = dict[str, float]


def sparsity_key(kind: str) -> str:
    return f"{kind}_sparsity" if kind else "sparsity"


@dataclass(frozen=True)
class Miss:
    """How near a kind of unit, or all parameters (kind ""), came to its target, in sparsities."""

    kind: str
    expected: float
    target: float

    @property
    def key(self) -> str:
        """In a log, after ``expected_`` and ``target_``."""
        return sparsity_key(self.kind)

    @property
    def missed(self) -> bool:
        return abs(self.expected - self.target) > TOLERANCE


@dataclass(frozen=True)
class Stage:
    """One run. ``lines`` are its steps, thinned; their ``tokens`` count those of the stages before, ``start``."""

    folder: Path
    lines: list[dict[str, Any]]
    gates: list[dict[str, Any]]
    facts: dict[str, Any]
    config: dict[str, Any]
    before: Losses  # held out, before its first step; {} in logs of older versions
    references: Losses
    samples: list[dict[str, Any]]
    start: int
    seconds: float  # of its steps, together
    skipped: int  # steps that changed nothing, because something was not finite

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1]

    @property
    def prunes(self) -> bool:
        return self.config.get("prune") is not None

    @property
    def steps(self) -> int:
        return int(self.facts.get("steps") or self.config["train"]["steps"])

    @property
    def finished(self) -> bool:
        return int(self.last["step"]) >= self.steps

    @property
    def tokens(self) -> int:
        """Seen in this stage."""
        return int(self.last["tokens"]) - self.start

    @property
    def evaluations(self) -> list[tuple[int, int, Losses]]:
        """(step, tokens, held-out losses), from before the first step where that is known."""
        found = [(line["step"], line["tokens"], line["held_out"]) for line in self.lines if "held_out" in line]
        return [(0, self.start, self.before), *found] if self.before else found

    @property
    def held_out(self) -> Losses | None:
        """The newest evaluation."""
        found = [line["held_out"] for line in self.lines if "held_out" in line]
        return found[-1] if found else None

    @property
    def misses(self) -> list[Miss]:
        """Parameters and each pruned kind at the end, against what was wanted then."""
        return [
            Miss(kind, self.last["expected_" + key], self.last["target_" + key])
            for kind in SPARSITIES
            if "expected_" + (key := sparsity_key(kind)) in self.last
        ]


@dataclass(frozen=True)
class Story:
    """Stages in order, and runs to compare their end with."""

    stages: list[Stage]
    baselines: list[Stage]

    @property
    def pruning(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.prunes), None)

    @property
    def source(self) -> Losses:
        """Losses that the story starts from: the source's, or the references that the first stage was given."""
        return self.stages[0].before or self.stages[0].references

    @property
    def source_is_measured(self) -> bool:
        first = self.stages[0]
        return bool(first.before) or first.config["data"].get("reference_losses") == "source"

    @property
    def domains(self) -> list[str]:
        return list(self.stages[0].last["weights"])

    def table(self) -> list[tuple[str, Losses]]:
        """Rows of held-out losses, from the source to the end, baselines last."""
        rows = [("source" if self.source_is_measured else "reference", self.source)] if self.source else []
        for stage in (*self.stages, *self.baselines):
            if stage.held_out:
                so_far = "" if stage.finished else f", step {stage.last['step']:,} of {stage.steps:,}"
                rows.append((stage.name + so_far, stage.held_out))
        return rows


def mean(losses: Losses) -> float:
    return fmean(losses.values())


def read(runs: list[Path], baselines: list[Path]) -> Story:
    """Read the story that ``runs`` tell in this order. Raises ValueError where one is no run or does not follow."""
    stages: list[Stage] = []
    for run in runs:
        stage = _stage(run, int(stages[-1].last["tokens"]) if stages else 0)
        if stages:
            _require_follows(stages[-1], stage)
        stages.append(stage)
    return Story(stages, [_stage(run, 0) for run in baselines])


def _stage(run: Path, start: int) -> Stage:
    if not (run / metrics.LOG).exists():
        raise ConfigError(
            f"{run} holds no {metrics.LOG}; give the folder that the config names under `run`, after its first step"
        )
    lines, headers = [line for line in metrics.read(run) if line["step"]], metrics.headers(run)
    if not lines:
        raise ConfigError(
            f"{run} has not finished its first step yet; ask again when it has, or, where train.steps=0 only chose "
            "units, give the run that goes on from it"
        )
    config = _config(run / "config.yaml")
    batch = config["train"]["batch"] * config["data"]["sequence"]
    snapshots = metrics.read_gates(run)
    _require_whole(run, lines, headers[-1:], snapshots)
    for line in lines:  # logs of older versions do not count tokens
        line["tokens"] = start + line.get("tokens", line["step"] * batch)
        held_out = line.get("held_out", {"": 0.0})
        if not held_out or None in held_out.values():  # not a number, which ended the run
            del line["held_out"]
    for snapshot in snapshots:
        snapshot["tokens"] = start + snapshot["step"] * batch
    return Stage(
        run,
        _thinned(lines),
        snapshots,
        headers[-1] if headers else {},
        config,
        (metrics.start(run) or {}).get("held_out", {}),
        metrics.read_references(run),
        metrics.read_lines(run / SAMPLES, SAMPLE),
        start,
        sum(line["seconds"] for line in lines) * lines[-1]["step"] / len(lines),
        sum("skipped" in line for line in lines),
    )


@with_config(ConfigDict(extra="allow"))
class _Train(TypedDict):
    batch: Size
    steps: int


@with_config(ConfigDict(extra="allow"))
class _Data(TypedDict):
    sequence: Size


@with_config(ConfigDict(extra="allow"))
class _Optimizer(TypedDict):
    learning_rate: Number


@with_config(ConfigDict(extra="allow"))
class _Config(TypedDict):
    """What is told of a config. It may be an older version's, which a run would not take."""

    model: str
    train: _Train
    data: _Data
    optimizer: _Optimizer


def _config(file: Path) -> dict[str, Any]:
    try:
        return dict(TypeAdapter(_Config).validate_python(parse_yaml(read_text(file), str(file))))
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({in_one_line(error)}); restore it") from None


STEP = ("loss", "weights", "seconds", "tokens_per_second")  # told of each
HEADER = ("versions", "device", "compute", "ranks", "layout", "shape")


def _require_whole(
    run: Path, lines: list[dict[str, Any]], headers: list[dict[str, Any]], snapshots: list[dict[str, Any]]
) -> None:
    """ConfigError where something that a report tells of is missing, or does not fit the rest."""
    of_masks = [
        f"{which}_{sparsity_key(kind)}"
        for kind in SPARSITIES
        for which in ("expected", "target")
        if f"expected_{sparsity_key(kind)}" in lines[-1]
    ]
    log = run / metrics.LOG
    found = [(f"step {line['step']}", line, (*STEP, *of_masks)) for line in lines]
    for what, values, keys in [*found, *(("the record of the run", header, HEADER) for header in headers)]:
        if absent := [key for key in keys if key not in values]:
            raise ConfigError(f"{log} is damaged ({what} lacks {', '.join(absent)}); restore it")
        if strange := sorted(set(values.get("multipliers", {})) - set(SPARSITIES)):
            raise ConfigError(f"{log} is damaged ({what} has a multiplier of {strange[0][:60]!r}); restore it")
    for snapshot in snapshots:
        layers = {len(snapshot[kind]) for kind in PER_LAYER if kind in snapshot}
        if not headers or layers - {headers[-1]["shape"]["layers"]}:
            raise ConfigError(
                f"{run / metrics.GATES} is not of this run (step {snapshot['step']} has {sorted(layers)} layers); "
                "restore it, or delete it"
            )


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every so many of ``lines``, and all that hold an evaluation, and the last."""
    stride = -(-len(lines) // POINTS)
    return [
        line
        for number, line in enumerate(lines)
        if number % stride == 0 or "held_out" in line or number == len(lines) - 1
    ]


def _require_follows(before: Stage, after: Stage) -> None:
    ends, begins = before.facts.get("target") or before.facts.get("shape"), after.facts.get("shape")
    if ends and begins and ends != begins:
        differs = next(key for key in ends if ends[key] != begins[key])
        raise ConfigError(
            f"{after.folder} starts from {differs}={begins[differs]}, but {before.folder} ends with "
            f"{differs}={ends[differs]}; give runs in the order in which they were made, others as --baseline"
        )
