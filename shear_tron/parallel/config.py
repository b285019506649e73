"""The ``parallel`` section of a run's configuration."""

from typing import Literal, Self

from pydantic import PositiveInt, field_validator, model_validator

from shear_tron.config import Section


class ParallelConfig(Section):
    """How ranks share the work: world size = pp * dp * tp."""

    tp: PositiveInt = 1  # tensor-parallel ranks: heads, ffn columns and vocabulary are cut between them
    sequence: bool = True  # with tp > 1, cut activations between the tensor-parallel parts by tokens
    pp: PositiveInt = 1  # pipeline-parallel ranks: layers are cut between them
    schedule: Literal["1f1b", "interleaved"] = "1f1b"  # of the pipeline: one stage per rank, or several
    stages: PositiveInt | None = None  # pipeline stages per rank; default 1 for 1f1b, 2 for interleaved
    dp: PositiveInt | None = None  # data-parallel ranks; default: what is left of the world
    shard: PositiveInt | None = None  # data-parallel ranks that share one copy of the weights (FSDP); default dp
    timeout: PositiveInt = 600  # seconds that ranks wait for one that does not answer

    @property
    def stages_per_rank(self) -> int:
        return self.stages or (2 if self.schedule == "interleaved" else 1)

    @field_validator("schedule", mode="before")
    @classmethod
    def _schedule(cls, value: object) -> object:
        if str(value).lower() in ("zb", "zbv", "zero_bubble", "zbvzerobubble", "interleavedzerobubble"):
            raise ValueError(
                f"schedule={value}: torch's zero-bubble schedules compute the gradients of parameters alone, and would "
                "lose the gradients of masks; use 1f1b or interleaved"
            )
        return value

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if self.pp == 1 and self.stages_per_rank > 1:
            raise ValueError(f"stages={self.stages_per_rank} with pp=1 has nothing to interleave; use pp >= 2")
        if self.schedule == "1f1b" and self.stages_per_rank > 1:
            raise ValueError(f"schedule=1f1b holds one stage per rank, not {self.stages_per_rank}; use interleaved")
        return self
