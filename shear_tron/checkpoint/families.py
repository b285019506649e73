"""Families of models: what Hugging Face calls their parameters, and how their config.json says the facts of a forward.

A family is a ``Family`` and no more code: names, what its config.json leaves out or spells otherwise than LLaMA's, and
two functions that translate what only it can say, one each way. Sizes and constants are the same for all
(``huggingface_config``), and a fact that a family has no word for is noticed there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.config_json import ConfigJson
from shear_tron.checkpoint.names import Names, Packed, with_biases
from shear_tron.reading import short

Facts = dict[str, Any]  # fields of Architecture
Keys = dict[str, Any]  # of config.json


@dataclass(frozen=True)
class Family:
    model: str  # transformers' class
    names: Names
    facts: Callable[[ConfigJson], Facts]
    keys: Callable[[Architecture], Keys]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers', where they are not LLaMA's
    spelling: Mapping[str, str | None] = field(default_factory=dict)  # of LLaMA's keys; None: has no such key
    activation: str = "silu"
    partial_rotary: bool = False  # heads may turn in part
    hidden_is_whole_heads: bool = False  # transformers refuses a hidden size that is no multiple of heads
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)  # endings of stored names that are no parameters


_LLAMA = with_biases(
    {
        "embed": "model.embed_tokens.weight",
        "attn_norm": "model.layers.{}.input_layernorm.weight",
        "q": "model.layers.{}.self_attn.q_proj.weight",
        "k": "model.layers.{}.self_attn.k_proj.weight",
        "v": "model.layers.{}.self_attn.v_proj.weight",
        "q_norm": "model.layers.{}.self_attn.q_norm.weight",
        "k_norm": "model.layers.{}.self_attn.k_norm.weight",
        "o": "model.layers.{}.self_attn.o_proj.weight",
        "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
        "gate": "model.layers.{}.mlp.gate_proj.weight",
        "up": "model.layers.{}.mlp.up_proj.weight",
        "down": "model.layers.{}.mlp.down_proj.weight",
        "norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
    }
)
_NEOX = with_biases(
    {
        "embed": "gpt_neox.embed_in.weight",
        "attn_norm": "gpt_neox.layers.{}.input_layernorm.weight",
        **dict.fromkeys("qkv", Packed("gpt_neox.layers.{}.attention.query_key_value.weight", ("q", "k", "v"), "head")),
        "o": "gpt_neox.layers.{}.attention.dense.weight",
        "mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm.weight",
        "up": "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight",
        "down": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
        "norm": "gpt_neox.final_layer_norm.weight",
        "lm_head": "embed_out.weight",
    }
)


# --- facts that several families have

_QKV = frozenset({"q", "k", "v"})
_ATTENTION = _QKV | {"o"}
_MLP = frozenset({"gate", "up", "down"})


def _bias_facts(config: ConfigJson) -> Facts:
    attention, mlp = config.flag("attention_bias"), config.flag("mlp_bias")
    return {"biases": (_ATTENTION if attention else frozenset()) | (_MLP if mlp else frozenset())}


def _bias_keys(architecture: Architecture) -> Keys:
    return {"attention_bias": architecture.biases >= _ATTENTION, "mlp_bias": architecture.biases >= _MLP}


def _window_facts(config: ConfigJson, full: Iterable[int]) -> Facts:
    """The window of a family that lists ``layer_types``; ``full``: layers that see all where the file lists none."""
    layers = config.size("num_hidden_layers")
    windowed = config.flag("use_sliding_window") and config.get("sliding_window") is not None
    types = config.get("layer_types")
    if types is None:
        kept = frozenset(full if windowed else range(layers))
    else:
        known = {"full_attention", "sliding_attention"}
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= known:
            raise config.error(
                f"layer_types={short(types)} is not supported; list one of {sorted(known)} for each layer"
            )
        kept = frozenset(layer for layer, kind in enumerate(types) if kind == "full_attention")
    if len(kept) == layers:
        return {}
    if not windowed:
        raise config.error("layer_types has sliding_attention without a window; set use_sliding_window, sliding_window")
    return {"window": config.size("sliding_window"), "full_layers": kept}


def _window_keys(architecture: Architecture) -> Keys:
    if architecture.window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = ("sliding_attention", "full_attention")
    types = [kinds[layer in architecture.full_layers] for layer in range(architecture.shape.layers)]
    return {"use_sliding_window": True, "sliding_window": architecture.window, "layer_types": types}


# --- LLaMA 1 to 3.x, CodeLlama, TinyLlama, SmolLM 1 and 2 and others that declare it

_llama = Family(
    "LlamaForCausalLM",
    _LLAMA,
    _bias_facts,
    _bias_keys,
    hidden_is_whole_heads=True,
)


# --- Mistral 7B: a window in every layer, or (since v0.2) none


def _mistral_facts(config: ConfigJson) -> Facts:
    return {} if config.get("sliding_window") is None else {"window": config.size("sliding_window")}


def _mistral_keys(architecture: Architecture) -> Keys:
    return {"sliding_window": architecture.window}


_mistral = Family(
    "MistralForCausalLM",
    _LLAMA,
    _mistral_facts,
    _mistral_keys,
    {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
)


# --- Qwen2, Qwen2.5: q, k and v have a bias; a window, if any, from layer max_window_layers on


def _qwen_window_facts(config: ConfigJson) -> Facts:
    return _window_facts(config, range(config.size("max_window_layers", least=0)))


def _qwen_window_keys(architecture: Architecture) -> Keys:
    full = architecture.shape.layers if architecture.window is None else len(architecture.full_layers)
    return {**_window_keys(architecture), "max_window_layers": full}


def _qwen2_facts(config: ConfigJson) -> Facts:
    return {"biases": _QKV, **_qwen_window_facts(config)}


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_qwen2 = Family("Qwen2ForCausalLM", _LLAMA, _qwen2_facts, _qwen_window_keys, _QWEN)


# --- Qwen3: q and k are normed head by head


def _qwen3_facts(config: ConfigJson) -> Facts:
    return {"qk_norm": True, **_bias_facts(config), **_qwen_window_facts(config)}


def _qwen3_keys(architecture: Architecture) -> Keys:
    return {**_bias_keys(architecture), **_qwen_window_keys(architecture)}


_qwen3 = Family("Qwen3ForCausalLM", _LLAMA, _qwen3_facts, _qwen3_keys, {**_QWEN, "head_dim": 128})


# --- SmolLM3: every so many layers do not turn


def _smollm3_facts(config: ConfigJson) -> Facts:
    layers, turned = config.size("num_hidden_layers"), config.get("no_rope_layers")  # 1: turns, in spite of the name
    if turned is None:
        every = config.size("no_rope_layer_interval")
        turned = [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(turned, list) or len(turned) < layers or not set(map(str, turned)) <= {"0", "1"}:
        raise config.error(f"no_rope_layers={short(turned)} is not supported; list 1 (turns) or 0 for each layer")
    unturned = frozenset(layer for layer in range(layers) if not turned[layer])
    windows = _window_facts(config, set(range(layers)) - unturned)
    return {"unturned_layers": unturned, **_bias_facts(config), **windows}


def _smollm3_keys(architecture: Architecture) -> Keys:
    turned = [int(layer not in architecture.unturned_layers) for layer in range(architecture.shape.layers)]
    return {"no_rope_layers": turned, **_bias_keys(architecture), **_window_keys(architecture)}


_smollm3 = Family(
    "SmolLM3ForCausalLM",
    _LLAMA,
    _smollm3_facts,
    _smollm3_keys,
    {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
        "no_rope_layer_interval": 4,
    },
)


# --- GPT-NeoX, Pythia: LayerNorm, a plain MLP, attention and MLP side by side, heads that turn in part, fused q, k, v


def _neox_facts(config: ConfigJson) -> Facts:
    attention = _ATTENTION if config.flag("attention_bias") else frozenset()
    parallel = config.flag("use_parallel_residual")
    return {"norm": "layer", "mlp": "gelu", "parallel_residual": parallel, "biases": attention | {"up", "down"}}


def _neox_keys(architecture: Architecture) -> Keys:
    attention = architecture.biases >= _ATTENTION
    return {"attention_bias": attention, "use_parallel_residual": architecture.parallel_residual}


_gpt_neox = Family(
    "GPTNeoXForCausalLM",
    _NEOX,
    _neox_facts,
    _neox_keys,
    {"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-5, "attention_bias": True, "use_parallel_residual": True},
    {
        "rms_norm_eps": "layer_norm_eps",
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
        "num_key_value_heads": None,
        "head_dim": None,
    },
    activation="gelu",
    partial_rotary=True,
    hidden_is_whole_heads=True,
    buffers=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
)


FAMILIES = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "gpt_neox": _gpt_neox,
}
