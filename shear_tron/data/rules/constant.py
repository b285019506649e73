"""The starting weights, whatever the losses."""

from pydantic import BaseModel, ConfigDict

from shear_tron.data.rules.evidence import Evidence, Memory, Weights


class Constant(BaseModel):
    """The starting weights, whatever the losses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def update(self, evidence: Evidence, memory: Memory) -> tuple[Weights, Memory]:
        return evidence.start.copy(), memory
