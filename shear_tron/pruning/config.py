"""The ``prune`` section of a run's configuration."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from shear_tron.config import Section
from shear_tron.shape import Shape


class TargetConfig(Section):
    """The shape to prune to. Sizes left out stay the source's. ``head_dim``, vocabulary and tying always stay."""

    hidden: PositiveInt | None = None  # width of the residual stream
    layers: PositiveInt | None = None  # transformer layers
    heads: PositiveInt | None = None  # query heads of a layer
    kv_heads: PositiveInt | None = None  # key-value heads of a layer, whole groups
    ffn: PositiveInt | None = None  # feed-forward (intermediate) width

    def shape(self, source: Shape) -> Shape:
        """The full target shape; ValueError where it cannot be cut out of ``source``."""
        given = {name: size for name, size in self.model_dump().items() if size is not None}
        target = Shape(**{**source.asdict(), **given})
        source.require_target(target)
        return target


class PruneConfig(Section):
    """How masks are made. With this section, training prunes; without it, it is plain pre-training.

    ``hard_concrete``: the paper's gates, learned under Lagrange constraints (section 2.1). The others keep the units of
    the largest score, an exact count at every step: ``fisher`` by the squares of their masks' gradients, ``magnitude``
    by their weights, ``activation`` by what they give, ``random`` by chance (docs/masks.md).
    """

    target: TargetConfig
    method: Literal["hard_concrete", "fisher", "magnitude", "activation", "random"] = (
        "hard_concrete"  # how masks are made (docs/masks.md)
    )
    # the target sparsity grows from 0 over these steps; 0: at once, before the first (not hard_concrete)
    warmup_steps: int = Field(ge=0)
    learning_rate: float = Field(1.0, gt=0)  # hard_concrete: of mask logits and multipliers
    decay: float = Field(0.9, ge=0, lt=1)  # fisher: of the running mean of scores, a microbatch
    calibration_batches: int = Field(16, ge=0)  # fisher, activation: batches scored before the first step
    # turn the residual stream to its principal axes first, found on calibration_batches: the function stays, hidden
    # keeps the first of them, embeddings are untied (docs/masks.md)
    rotate: bool = False
    compact: bool = True  # leave closed units out of every step; exact (docs/compaction.md)
    pad_to: PositiveInt | None = None  # kept counts are multiples of it; default 64 on CUDA, 16 on the CPU
    balance: PositiveInt = 1  # blocks of heads and ffn columns that keep equal counts; parallel.tp or a multiple of it

    @model_validator(mode="after")
    def _starts(self) -> Self:
        if self.method == "hard_concrete" and not self.warmup_steps:
            raise ValueError("warmup_steps=0 closes gates before they could learn; use 1 or more, or method=fisher")
        if self.method == "activation" and not self.calibration_batches:
            raise ValueError("method=activation scores units on calibration_batches; use 1 or more")
        if self.method == "fisher" and not self.warmup_steps and not self.calibration_batches:
            raise ValueError("warmup_steps=0 closes units before any has a score; use calibration_batches of 1 or more")
        if self.rotate and self.method == "hard_concrete":
            raise ValueError("rotate fixes which hidden dimensions go, hard_concrete learns it; use another method")
        if self.rotate and not self.calibration_batches:
            raise ValueError("rotate finds its axes on calibration_batches; use 1 or more")
        return self

    @property
    def batches_before(self) -> int:
        """Batches that the method sees before the first step."""
        return self.calibration_batches if self.method == "fisher" else 0
