"""The ``prune`` section of a run's configuration."""

from pydantic import Field, PositiveInt

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
    """Learning masks (paper section 2.1). With this section, training prunes; without it, it is plain pre-training."""

    target: TargetConfig
    learning_rate: float = Field(1.0, gt=0)  # of mask logits and multipliers
    warmup_steps: PositiveInt  # the target sparsity grows linearly from 0 over these steps
    compact: bool = True  # leave closed units out of every step; exact (docs/compaction.md)
    pad_to: PositiveInt | None = None  # kept counts are multiples of it; default 64 on CUDA, 16 on the CPU
    balance: PositiveInt = 1  # blocks of heads and ffn columns that keep equal counts; parallel.tp or a multiple of it
