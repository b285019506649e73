"""config.json of a Hugging Face folder, to and from an ``Architecture``: what all families have in common."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint.config_json import ConfigJson, RopeJson
from shear_tron.checkpoint.families import FAMILIES, Family
from shear_tron.checkpoint.safetensors_stream import read_json
from shear_tron.reading import short
from shear_tron.shape import Shape

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keys that say of any model that its forward is none of ours, and why.
_REFUSED_KEYS = {
    "quantization_config": "quantised weights are not supported; use the float checkpoint",
    "is_encoder_decoder": "an encoder-decoder is not supported; use a decoder",
    "num_experts": "a mixture of experts is not supported; use a dense model",
    "num_local_experts": "a mixture of experts is not supported; use a dense model",
    "n_routed_experts": "a mixture of experts is not supported; use a dense model",
    "attn_logit_softcapping": "attention scores with a soft cap are not supported; use a model without",
    "final_logit_softcapping": "logits with a soft cap are not supported; use a model without",
    "rope_interleaved": "rotary pairs of neighbours are not supported; use a model that turns halves",
}
_REFUSED_TYPES = {
    "olmo2": "it norms q and k over all heads, which tensor parallelism cuts, and norms what a branch gives",
    "olmo3": "it norms q and k over all heads, which tensor parallelism cuts, and norms what a branch gives",
    "gemma": "its norms scale by 1 + weight",
    "phi3": "its q, k, v and its gate and up are fused in a way that no family here has",
}


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture that ``config.json`` of a folder describes; ValueError where this project has another forward.

    What the file leaves out has the value that transformers' config class of the family gives it; of sizes only the
    number of key-value heads, their width and the context may be left out.
    """
    path = Path(folder) / "config.json"
    return _architecture(path, read_json(path))


def family_of(architecture: Architecture) -> Family:
    if architecture.family not in FAMILIES:
        raise ValueError(f"family={architecture.family!r} is not known; use one of {', '.join(FAMILIES)}")
    return FAMILIES[architecture.family]


def _architecture(path: Path, values: Mapping[str, Any]) -> Architecture:
    for key, reason in _REFUSED_KEYS.items():
        if values.get(key):
            raise ValueError(f"{path}: {key}={short(values[key])}: {reason}")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        why = f" ({_REFUSED_TYPES[kind]})" if isinstance(kind, str) and kind in _REFUSED_TYPES else ""
        raise ValueError(f"{path}: model_type={short(kind)} is not supported{why}; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    try:
        config = family.config.of(values, family.spelling)
        act = config.hidden_act or family.activation
        if act != family.activation and (act, family.activation) != ("swish", "silu"):
            raise ValueError(f"hidden_act={short(act)} is not supported; use a {kind} model with {family.activation!r}")
        shape = _shape(config)
        rope = _rope(config, family, shape.head_dim)
        return Architecture(
            shape,
            rope,
            norm_eps=config.rms_norm_eps,
            context=config.max_position_embeddings,
            family=kind,
            **config.facts(),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _shape(config: ConfigJson) -> Shape:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.head_dim is None and hidden % heads:
        raise ValueError(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}; set head_dim")
    return Shape(
        hidden,
        config.num_hidden_layers,
        heads,
        config.num_key_value_heads or heads,
        config.head_dim or hidden // heads,
        config.intermediate_size,
        config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def _rope(config: ConfigJson, family: Family, head_dim: int) -> Rope:
    """Rotary parameters: ``rope_parameters`` of transformers 5, or single keys and ``rope_scaling`` before it."""
    found = config.rope_scaling or config.rope_parameters or RopeJson()
    theta = found.rope_theta or config.rope_theta
    share = found.partial_rotary_factor or config.partial_rotary_factor
    if share != 1 and not (family.partial_rotary and share < 1 and int(head_dim * share) % 2 == 0):
        key = family.spelling.get("partial_rotary_factor", "partial_rotary_factor")
        raise ValueError(
            f"{key}={share} of head_dim={head_dim} is not supported; use a model that turns whole heads, or (GPT-NeoX) "
            "an even number of entries"
        )
    if found.rope_type == "default":
        return Rope(theta=theta, share=share)
    stretched: dict[str, Any] = {
        "factor": found.factor,
        "low_freq_factor": found.low_freq_factor,
        "high_freq_factor": found.high_freq_factor,
        "original_context": found.original_max_position_embeddings,
    }
    return Rope(theta=theta, share=share, **stretched)


def architecture_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` of a model. In the older spelling, which transformers 4 and 5 both read.

    Raises ValueError where transformers refuses the sizes, and where the family's config.json cannot say what the
    architecture is: it must read back as the same.
    """
    family, shape, rope = family_of(architecture), architecture.shape, architecture.rope
    if family.hidden_is_whole_heads and shape.hidden % shape.heads:
        raise ValueError(
            f"hidden={shape.hidden} is no multiple of heads={shape.heads}, which transformers' {family.model} asks "
            "for; shear to sizes that divide"
        )
    scaling = {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_context,
    }
    common = {
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
        "rope_scaling": None if rope == Rope(rope.theta, share=rope.share) else scaling,
        "hidden_act": family.activation,
    }
    if family.partial_rotary:
        common["partial_rotary_factor"] = rope.share
    spelled = {family.spelling.get(key, key): value for key, value in common.items()}
    config: dict[str, Any] = {
        "architectures": [family.model],
        "model_type": architecture.family,
        **{key: value for key, value in spelled.items() if key is not None},
        **family.keys(architecture),
        # Without these transformers would assume others; `write` takes them from the tokenizer's folder.
        **dict.fromkeys(TOKEN_IDS),
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # transformers 4's word for it
    }
    _require_said(architecture, _architecture(Path("config.json"), config))
    return config


def _require_said(meant: Architecture, said: Architecture) -> None:
    ours, theirs = ({**asdict(each), **each.shape.asdict()} for each in (meant, said))
    for key in ours:
        if key != "shape" and ours[key] != theirs[key]:
            raise ValueError(
                f"{key}={ours[key]!r} cannot be said in a config.json of {meant.family}, which would be read as "
                f"{theirs[key]!r}; use what the family can say"
            )
