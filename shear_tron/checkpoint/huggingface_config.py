"""config.json of a Hugging Face folder, to and from an ``Architecture``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint.safetensors_stream import read_json
from shear_tron.shape import Shape

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture that ``config.json`` of a folder describes; ValueError where this project has another forward.

    What the file leaves out has the value that transformers' LlamaConfig gives it; sizes may not be left out.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    _refuse_other_models(path, config)

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{path}: {key}={value!r} is not a size; use a whole number")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if config.get("head_dim") is None and hidden % max(heads, 1):
        raise ValueError(f"{path}: hidden_size={hidden} is no multiple of num_attention_heads={heads}; set head_dim")
    try:
        shape = Shape(
            hidden=hidden,
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // max(heads, 1)),
            ffn=size("intermediate_size"),
            vocab=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}") from None
    context = size("max_position_embeddings", 2048)
    return Architecture(shape, _read_rope(path, config), _number(path, config, "rms_norm_eps", 1e-6), context)


def _refuse_other_models(path: Path, config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != "llama":
        raise ValueError(
            f"{path}: model_type={model_type!r} is not supported; use a 'llama' model (LLaMA 1 to 3, SmolLM, TinyLlama "
            "and others that declare it)"
        )
    for key in ("attention_bias", "mlp_bias", "rope_interleaved"):
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported; use a model where it is false")
    if config.get("quantization_config"):
        raise ValueError(f"{path}: quantised weights are not supported; use the float checkpoint")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{path}: hidden_act={config['hidden_act']!r} is not supported; use a model with 'silu'")


def _number(path: Path, values: Mapping[str, Any], key: str, default: float | None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{path}: {key}={value!r} is not a positive number; set it")
    return float(value)


def _read_rope(path: Path, config: Mapping[str, Any]) -> Rope:
    """Rotary parameters: ``rope_parameters`` of transformers 5, or ``rope_theta`` with ``rope_scaling`` before it."""
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: rotary parameters {values!r} are not an object; use one with rope_type")
    theta = _number(path, values, "rope_theta", _number(path, config, "rope_theta", 10000.0))
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ValueError(f"{path}: partial_rotary_factor other than 1 is not supported; use a model that turns all")
    if kind == "default":
        return Rope(theta=theta)
    if kind != "llama3":
        raise ValueError(f"{path}: rope_type={kind!r} is not supported; use a model with 'default' or 'llama3'")
    return Rope(
        theta=theta,
        factor=_number(path, values, "factor", None),
        low_freq_factor=_number(path, values, "low_freq_factor", None),
        high_freq_factor=_number(path, values, "high_freq_factor", None),
        original_context=int(_number(path, values, "original_max_position_embeddings", None)),
    )


def architecture_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` of a model. In the older spelling, which transformers 4 and 5 both read.

    Raises ValueError where transformers refuses the sizes: it wants hidden to be a multiple of heads in any case.
    """
    shape, rope = architecture.shape, architecture.rope
    if shape.hidden % shape.heads:
        raise ValueError(
            f"hidden={shape.hidden} is no multiple of heads={shape.heads}, which transformers' LLaMA asks for; "
            "shear to sizes that divide"
        )
    scaling = {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": architecture.context,
        "rms_norm_eps": architecture.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.factor == 1.0 else scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # Without these transformers would assume LLaMA-2's; `write` takes them from the tokenizer's folder.
        **dict.fromkeys(TOKEN_IDS),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
