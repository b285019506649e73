"""The ``data`` section of a run's configuration."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from shear_tron.config import Section
from shear_tron.data.mixture import MixtureConfig

Share = Annotated[float, Field(ge=0)]


class DataConfig(Section):
    """Where the tokens are and how domains are mixed (paper section 2.2)."""

    folder: str  # made by `shear-tron prepare`
    verify: bool = False  # read every shard before the first step, and compare its sha256; ranks share the work
    sequence: PositiveInt  # tokens a training window predicts
    # starting mixture, normalised: a weight a domain, "proportional" to their tokens, or a run folder: that run's final
    weights: dict[str, Share] | str = "proportional"
    after: str | None = None  # a run folder: begin with the samples after those it used; none: with the first
    # a loss per domain, a JSON or YAML file of them, or "source": measured from the model before the first step
    reference_losses: dict[str, float] | str | None = None
    update_every: int = Field(0, ge=0)  # steps between updates of the mixture; 0: constant
    evaluate_every: int = Field(0, ge=0)  # steps between held-out evaluations without an update; 0: only at the end
    evaluate_windows: PositiveInt = 32  # held-out windows per domain
    document_masking: bool = False  # attention does not cross documents of a window, positions restart in each
    mixture: MixtureConfig = MixtureConfig()

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if isinstance(self.weights, dict) and not any(self.weights.values()):
            raise ValueError("weights are all 0, or there are none; give at least one domain a weight")
        return self

    @model_validator(mode="after")
    def _references(self) -> Self:
        if self.update_every and self.reference_losses is None:
            raise ValueError(
                f"update_every={self.update_every} needs reference_losses; give a loss per domain, or `source` to "
                "measure them from the model at the start"
            )
        return self
