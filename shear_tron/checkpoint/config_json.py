"""config.json of a Hugging Face folder as a typed model: what all families have in common, in LLaMA's spelling.

A family's own class adds its keys, and its defaults where they are not LLaMA's; all are transformers'.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUseDefault

from shear_tron.reading import explain

# Sizes beyond these are a damaged file's, and would only be found out after long allocations or loops.
MOST_LAYERS, LARGEST_SIZE, LONGEST_CONTEXT = 10_000, 2**24, 2**31

Facts = dict[str, Any]  # fields of Architecture


def _null_is_left_out(value: object) -> object:
    if value is None:
        raise PydanticUseDefault
    return value


Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Context = Annotated[int, Field(ge=1, le=LONGEST_CONTEXT)]
Positive = Annotated[float, Field(gt=0, lt=1e18)]
Number = Annotated[Positive, BeforeValidator(_null_is_left_out)]
Flag = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]

_READ = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class RopeJson(BaseModel):
    """``rope_parameters`` of transformers 5, or ``rope_scaling`` before it."""

    model_config = _READ

    rope_type: Literal["default", "llama3"] = "default"
    rope_theta: Positive | None = None  # none: the one outside
    partial_rotary_factor: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Context | None = None

    @model_validator(mode="before")
    @classmethod
    def _older_spelling(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("is not an object; use one, or null")
        if any(isinstance(value, dict) for value in values.values()):
            raise ValueError("one by kind of layer is not supported; use a model with one for all layers")
        return {**values, "rope_type": values.get("rope_type") or values.get("type") or "default"}

    @model_validator(mode="after")
    def _llama3_is_whole(self) -> Self:
        if self.rope_type == "llama3":
            needed = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
            if missing := [key for key in needed if getattr(self, key) is None]:
                raise ValueError(f"rope_type='llama3' needs {', '.join(missing)}; set what is missing")
        return self


class ConfigJson(BaseModel):
    """What is read of a config.json. Null means left out, but of sizes that may be none and of flags (false)."""

    model_config = _READ

    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None  # none: as many as heads
    head_dim: Size | None = None  # none: the hidden size's share
    intermediate_size: Size
    vocab_size: Size
    tie_word_embeddings: Flag = False
    max_position_embeddings: Context = 2048
    rms_norm_eps: Number = 1e-6
    rope_theta: Number = 10000.0
    partial_rotary_factor: Number = 1.0
    rope_scaling: RopeJson | None = None
    rope_parameters: RopeJson | None = None
    hidden_act: str | None = None  # none: the family's

    @classmethod
    def of(cls, values: Mapping[str, Any], spelling: Mapping[str, str | None]) -> Self:
        """Read ``values``; ``spelling``: what the file calls some keys; None: it has no such key.

        Raises ValueError, with everything that is wrong in one line.
        """
        spelled = {key: spelling.get(key, key) for key in cls.model_fields}
        try:
            return cls.model_validate({ours: values[key] for ours, key in spelled.items() if key and key in values})
        except ValidationError as error:
            raise ValueError(explain(error, spelled)) from None

    def facts(self) -> Facts:
        """What only this family can say. Raises ValueError where it says what no forward of ours does."""
        return {}
