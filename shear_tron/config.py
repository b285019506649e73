"""The configuration of a run: one YAML file, validated whole before anything starts.

``load(TrainConfig, "run.yaml", ["train.steps=100", "parallel.tp=2"])`` reads a file and lays ``section.key=value``
overrides over it. Unknown keys and wrong types are errors that name the nearest valid key.
"""

import difflib
import re
import typing
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from shear_tron.data.mixture import MixtureConfig
from shear_tron.shape import Shape


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the rule and the fix."""


class Section(BaseModel):
    """A part of the configuration: immutable, with no keys but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TargetConfig(Section):
    """The shape to prune to. Sizes left out stay the source's. ``head_dim``, vocabulary and tying always stay."""

    hidden: PositiveInt | None = None
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    ffn: PositiveInt | None = None

    def shape(self, source: Shape) -> Shape:
        """The full target shape; ValueError where it cannot be cut out of ``source``."""
        given = {name: size for name, size in self.model_dump().items() if size is not None}
        target = Shape(**{**source.asdict(), **given})
        source.require_target(target)
        return target


class PruneConfig(Section):
    """Learning masks (paper section 2.1). With this section, training prunes; without it, it is plain pre-training."""

    target: TargetConfig
    learning_rate: float = Field(1.0, gt=0)  # of mask logits and multipliers
    warmup_steps: PositiveInt  # the target sparsity grows linearly from 0 over these steps
    compact: bool = True  # leave closed units out of every step; exact (docs/compaction.md)
    multiple: PositiveInt | None = None  # kept counts are padded up to it; default 64 on CUDA, 16 on the CPU
    balance: PositiveInt = 1  # blocks of heads and ffn columns that keep equal counts; parallel.tp or a multiple of it


class DataConfig(Section):
    """Where the tokens are and how domains are mixed (paper section 2.2)."""

    folder: str  # made by `shear-tron prepare`
    sequence: PositiveInt  # tokens a training window predicts
    weights: dict[str, float] | Literal["proportional"] = "proportional"  # starting mixture; normalised
    # a loss a domain, a JSON or YAML file of them, or "source": measured from the model before the first step
    reference_losses: dict[str, float] | str | None = None
    update_every: int = Field(0, ge=0)  # steps between updates of the mixture; 0: constant
    evaluate_every: int = Field(0, ge=0)  # steps between held-out evaluations without an update; 0: only at the end
    evaluate_windows: PositiveInt = 32  # held-out windows a domain
    document_masking: bool = False  # attention does not cross documents of a window, positions restart in each
    mixture: MixtureConfig = MixtureConfig()

    @model_validator(mode="after")
    def _references(self) -> Self:
        if self.update_every and self.reference_losses is None:
            raise ValueError(
                f"update_every={self.update_every} needs reference_losses; give a loss per domain, or `source` to "
                "measure them from the model at the start"
            )
        return self


class OptimConfig(Section):
    """How long and how fast. ``batch`` and ``micro_batch`` count sequences; a batch is all ranks' together."""

    steps: PositiveInt
    batch: PositiveInt
    micro_batch: PositiveInt = 1
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    min_learning_rate: float = Field(0.1, ge=0, le=1)  # as a share of learning_rate, at the end of the cosine
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0)  # global gradient norm
    seed: int = Field(0, ge=0)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # compute; auto: bfloat16 on CUDA, float32 on the CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: PositiveInt = 1
    checkpoint_every: int = Field(0, ge=0)  # 0: only at the end
    keep_checkpoints: PositiveInt = 2  # the newest that stay on disk

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch={self.batch} is not a multiple of micro_batch={self.micro_batch}")
        return self


class ParallelConfig(Section):
    """How ranks share the work: world size = pp * dp * tp."""

    tp: PositiveInt = 1
    sequence: bool = True  # with tp > 1, cut activations between the tensor-parallel parts by tokens
    pp: PositiveInt = 1
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    stages: PositiveInt | None = None  # pipeline stages a rank holds; default 1 for 1f1b, 2 for interleaved
    dp: PositiveInt | None = None  # default: what is left of the world
    shard: PositiveInt | None = None  # data-parallel ranks that share one copy of the weights (FSDP); default dp

    @property
    def stages_per_rank(self) -> int:
        return self.stages or (2 if self.schedule == "interleaved" else 1)

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if self.pp == 1 and self.stages_per_rank > 1:
            raise ValueError(f"stages={self.stages_per_rank} with pp=1 has nothing to interleave; use pp >= 2")
        if self.schedule == "1f1b" and self.stages_per_rank > 1:
            raise ValueError(f"schedule=1f1b holds one stage a rank, not {self.stages_per_rank}; use interleaved")
        return self


class TrainConfig(Section):
    """One run of ``shear-tron train``: pruning if ``prune`` is there, (continued) pre-training if not."""

    run: str  # folder of this run: its resolved config, log and checkpoints
    model: str  # a Hugging Face folder: config.json, safetensors, tokenizer
    data: DataConfig
    train: OptimConfig
    prune: PruneConfig | None = None
    parallel: ParallelConfig = ParallelConfig()


Config = TypeVar("Config", bound=BaseModel)


def load(kind: type[Config], path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read ``path`` (YAML) as a ``kind``, with ``section.key=value`` overrides. Raises ConfigError in one line."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read ({error.strerror}); give a path to a YAML file") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping of sections; see examples/")
    for override in overrides or []:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(kind, error)}") from None


def save(config: BaseModel, path: Path) -> None:
    """Write the resolved config, every default spelled out, as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 and everybody's expectation have it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is {inner!r}, not a section")
        values = inner
    try:
        values[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first problem in one line; for a misspelt key, the nearest valid one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        valid = _keys_at(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), valid, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {where!r}; {hint}valid keys here: {', '.join(valid)}{more}"
    if first["type"] == "missing":
        return f"{where} is missing; it has no default{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f"={first['input']!r}"
    return f"{where}{given}: {message}{more}"


def _keys_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the section at ``path``."""
    for part in path:
        field = kind.model_fields.get(str(part))
        section = _section(field.annotation) if field else None
        if section is not None:
            kind = section
    return list(kind.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None
