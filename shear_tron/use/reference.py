"""What loss a domain should reach: predicted from larger models' losses, or measured.

The paper (section 2.2 and appendix A) predicts a target's reference loss by a scaling curve through the losses of
LLaMA-2 7B, 13B and 70B, or takes the source model's own loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter

from shear_tron.files import write_atomically
from shear_tron.reading import in_one_line, parse_yaml, read_text
from shear_tron.use.compare import compare

log = getLogger(__name__)

STEEPEST, FLATTEST = 3.0, 1e-4  # exponents searched


@dataclass(frozen=True)
class Curve:
    """``L(N) = floor + scale / N**exponent`` nats per token of N parameters (Hoffmann et al. 2022, at fixed tokens)."""

    floor: float
    scale: float
    exponent: float

    def loss(self, parameters: float) -> float:
        return self.floor + self.scale * math.exp(-self.exponent * math.log(parameters))

    @classmethod
    def fit(cls, parameters: Sequence[float], losses: Sequence[float]) -> "Curve":
        """The least-squares curve, exact through three points. Raises ValueError for fewer than three sizes, or losses
        that do not fall as models grow."""
        sizes, values = np.asarray(parameters, np.float64), np.asarray(losses, np.float64)
        if sizes.shape != values.shape or len(np.unique(sizes)) < 3:
            raise ValueError(
                f"a scaling curve has three unknowns; give losses of three sizes, not of {list(parameters)}"
            )
        if not (np.isfinite(values).all() and (sizes > 0).all()):
            raise ValueError(
                f"losses {list(losses)} of sizes {list(parameters)} must be finite numbers and positive sizes"
            )
        logarithm = np.log(sizes / sizes.min())

        def solve(exponent: float) -> tuple[float, float, float]:
            """Given the exponent, floor and scale are linear: (squared error, floor, scale at the smallest size)."""
            design = np.stack([np.ones_like(sizes), np.exp(-exponent * logarithm)], axis=1)
            (floor, scale), *_ = np.linalg.lstsq(design, values, rcond=None)
            return float(((design @ [floor, scale] - values) ** 2).sum()), float(floor), float(scale)

        grid = np.geomspace(FLATTEST, STEEPEST, 400)
        best = int(np.argmin([solve(exponent)[0] for exponent in grid]))
        exponent = _minimise(lambda x: solve(x)[0], grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
        _, floor, scale = solve(exponent)
        if scale <= 0:
            raise ValueError(
                f"losses {list(losses)} do not fall with sizes {list(parameters)}; no scaling curve fits them"
            )
        if best in (0, len(grid) - 1):
            log.warning("losses %s hardly bend with size: the exponent is at the edge of its range", list(losses))
        return cls(floor, scale * float(sizes.min()) ** exponent, exponent)


def _minimise(function: Callable[[float], float], low: float, high: float) -> float:
    """Golden-section search."""
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(100):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, second) if function(first) < function(second) else (first, high)
    return float((low + high) / 2)


def predict(losses: Mapping[float, Mapping[str, float]], parameters: float) -> dict[str, float]:
    """Each domain's reference loss for a model of ``parameters``, from ``losses[size][domain]`` of larger or smaller
    ones. Raises ValueError when a size lacks a domain that another has."""
    sizes = sorted(losses)
    names = list(dict.fromkeys(name for size in sizes for name in losses[size]))
    for size in sizes:
        if absent := [name for name in names if name not in losses[size]]:
            raise ValueError(
                f"the model of {size:.0f} parameters has no loss of {', '.join(absent)}; measure it there too"
            )
    return {name: Curve.fit(sizes, [losses[size][name] for size in sizes]).loss(parameters) for name in names}


class ReferenceConfig(BaseModel):
    """Where reference losses come from.

    ``models`` (Hugging Face folders, nanotron checkpoints or Hub ids) are measured on the held-out shards of
    ``folder``; ``losses`` is a YAML file ``{parameters: {domain: loss}}`` of sizes that were measured elsewhere. With
    ``parameters`` the losses of all of them predict a model of that size; without, there is one model, and its own
    losses are the references.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int | None = Field(default=None, gt=0)  # of the target, embeddings included
    losses: str | None = None  # YAML file {parameters: {domain: loss}} of sizes measured elsewhere
    models: list[str] = []  # to measure: Hugging Face folders, nanotron checkpoints or Hub ids
    folder: str | None = None  # made by `shear-tron prepare` with the models' tokenizer
    sequence: int = Field(default=2048, gt=0)  # tokens of a window
    windows: int = Field(default=64, gt=0)  # held-out windows per domain
    batch: int = Field(default=4, gt=0)  # windows at a time
    device: str = "auto"  # auto: CUDA where there is one
    output: str | None = None  # YAML file for the result, to put under data.reference_losses


def reference_losses(config: ReferenceConfig) -> dict[str, float]:
    """Each domain's reference loss, nats per token. Raises ValueError for sources that do not belong together."""
    table: dict[FiniteFloat, dict[str, FiniteFloat]] = {}
    if config.losses is not None:
        table |= _read(config.losses)
    for model in config.models:
        if config.folder is None:
            raise ValueError(f"models={config.models} are measured on prepared data; give its folder")
        parameters, losses = _measured(model, config)
        log.info("%s: %s parameters, %s", model, f"{parameters:,}", losses)
        table[parameters] = losses
    if not table:
        raise ValueError("nothing to take reference losses from; give models, or a file of losses")
    if config.parameters is not None:
        result = predict(table, config.parameters)
    elif len(table) == 1:
        (result,) = table.values()
    else:
        raise ValueError(f"losses of {len(table)} sizes need parameters, the size of the model to predict")
    if config.output is not None:
        rounded = {name: round(loss, 4) for name, loss in result.items()}
        write_atomically(Path(config.output), yaml.safe_dump(rounded))
    return result


def _read(path: str) -> dict[FiniteFloat, dict[str, FiniteFloat]]:
    try:
        return TypeAdapter(dict[FiniteFloat, dict[str, FiniteFloat]]).validate_python(parse_yaml(read_text(path), path))
    except ValueError as error:
        raise ValueError(
            f"losses={path} cannot be read ({in_one_line(error)}); it must be {{parameters: {{domain: loss}}}}"
        ) from None


def _measured(model: str, config: ReferenceConfig) -> tuple[int, dict[str, float]]:
    """(parameters, loss by domain) on held-out windows. Domains with none are left out."""
    sizes = config.sequence, config.windows, config.batch
    told = compare([model], str(config.folder), *sizes, config.device)["models"][model]
    return told["parameters"], {name: row["loss"] for name, row in told["domains"].items()}
