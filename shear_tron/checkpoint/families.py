"""Families of models: what Hugging Face calls their parameters, and how their config.json says the facts of a forward.

A family is a ``Family`` and no more code: names, what its config.json spells otherwise than LLaMA's, a class of its own
keys and defaults, and two functions that translate what only it can say, one each way. Sizes and constants are the same
for all (``huggingface_config``), and a fact that a family has no word for is noticed there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.config_json import ConfigJson, Context, Facts, Flag, Number, Size
from shear_tron.checkpoint.names import Names, Packed, with_biases

Keys = dict[str, Any]  # of config.json


@dataclass(frozen=True)
class Family:
    model: str  # transformers' class
    names: Names
    config: type[ConfigJson]
    keys: Callable[[Architecture], Keys]
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


# --- keys that several families have

_QKV = frozenset({"q", "k", "v"})
_ATTENTION = _QKV | {"o"}
_MLP = frozenset({"gate", "up", "down"})


class _Biased(ConfigJson):
    attention_bias: Flag = False
    mlp_bias: Flag = False

    def facts(self) -> Facts:
        attention, mlp = self.attention_bias, self.mlp_bias
        biases = (_ATTENTION if attention else frozenset()) | (_MLP if mlp else frozenset())
        return {**super().facts(), "biases": biases}


def _bias_keys(architecture: Architecture) -> Keys:
    return {"attention_bias": architecture.biases >= _ATTENTION, "mlp_bias": architecture.biases >= _MLP}


class _Windowed(ConfigJson):
    use_sliding_window: Flag = False
    sliding_window: Size | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    def full(self) -> Iterable[int]:
        """Layers that see all where the file lists no ``layer_types``."""
        raise NotImplementedError

    def facts(self) -> Facts:
        layers, types = self.num_hidden_layers, self.layer_types
        window = self.sliding_window if self.use_sliding_window else None
        if types is None:
            kept = frozenset(range(layers) if window is None else self.full())
        elif len(types) != layers:
            raise ValueError(f"layer_types lists {len(types)} layers of num_hidden_layers={layers}; list each")
        else:
            kept = frozenset(layer for layer, kind in enumerate(types) if kind == "full_attention")
        if len(kept) == layers:
            return super().facts()
        if window is None:
            raise ValueError(
                "layer_types has sliding_attention without a window; set use_sliding_window, sliding_window"
            )
        return {**super().facts(), "window": window, "full_layers": kept}


def _window_keys(architecture: Architecture) -> Keys:
    if architecture.window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = ("sliding_attention", "full_attention")
    types = [kinds[layer in architecture.full_layers] for layer in range(architecture.shape.layers)]
    return {"use_sliding_window": True, "sliding_window": architecture.window, "layer_types": types}


# --- LLaMA 1 to 3.x, CodeLlama, TinyLlama, SmolLM 1 and 2 and others that declare it

_llama = Family("LlamaForCausalLM", _LLAMA, _Biased, _bias_keys, hidden_is_whole_heads=True)


# --- Mistral 7B: a window in every layer, or (since v0.2) none


class _Mistral(ConfigJson):
    num_key_value_heads: Size | None = 8
    max_position_embeddings: Context = 131072
    sliding_window: Size | None = 4096

    def facts(self) -> Facts:
        return {} if self.sliding_window is None else {"window": self.sliding_window}


def _mistral_keys(architecture: Architecture) -> Keys:
    return {"sliding_window": architecture.window}


_mistral = Family("MistralForCausalLM", _LLAMA, _Mistral, _mistral_keys)


# --- Qwen2, Qwen2.5: q, k and v have a bias; a window, if any, from layer max_window_layers on


class _QwenWindowed(_Windowed):
    num_key_value_heads: Size | None = 32
    max_position_embeddings: Context = 32768
    sliding_window: Size | None = 4096
    max_window_layers: Annotated[int, Field(ge=0)] = 28

    def full(self) -> Iterable[int]:
        return range(min(self.max_window_layers, self.num_hidden_layers))


class _Qwen2(_QwenWindowed):
    def facts(self) -> Facts:
        return {**super().facts(), "biases": _QKV}


def _qwen_window_keys(architecture: Architecture) -> Keys:
    full = architecture.shape.layers if architecture.window is None else len(architecture.full_layers)
    return {**_window_keys(architecture), "max_window_layers": full}


_qwen2 = Family("Qwen2ForCausalLM", _LLAMA, _Qwen2, _qwen_window_keys)


# --- Qwen3: q and k are normed head by head


class _Qwen3(_QwenWindowed, _Biased):
    head_dim: Size | None = 128

    def facts(self) -> Facts:
        return {**super().facts(), "qk_norm": True}


def _qwen3_keys(architecture: Architecture) -> Keys:
    return {**_bias_keys(architecture), **_qwen_window_keys(architecture)}


_qwen3 = Family("Qwen3ForCausalLM", _LLAMA, _Qwen3, _qwen3_keys)


# --- SmolLM3: every so many layers do not turn


class _SmolLM3(_Windowed, _Biased):
    num_key_value_heads: Size | None = 4
    max_position_embeddings: Context = 32768
    tie_word_embeddings: Flag = True
    rope_theta: Number = 2000000.0
    no_rope_layer_interval: Size = 4
    no_rope_layers: list[Literal[0, 1]] | None = None  # 1: turns, in spite of the name

    def unturned(self) -> frozenset[int]:
        layers, turned = range(self.num_hidden_layers), self.no_rope_layers
        if turned is None:
            return frozenset(layer for layer in layers if (layer + 1) % self.no_rope_layer_interval == 0)
        if len(turned) < len(layers):
            raise ValueError(f"no_rope_layers lists {len(turned)} layers of num_hidden_layers={len(layers)}; list each")
        return frozenset(layer for layer in layers if not turned[layer])

    def full(self) -> Iterable[int]:
        return set(range(self.num_hidden_layers)) - self.unturned()

    def facts(self) -> Facts:
        return {**super().facts(), "unturned_layers": self.unturned()}


def _smollm3_keys(architecture: Architecture) -> Keys:
    turned = [int(layer not in architecture.unturned_layers) for layer in range(architecture.shape.layers)]
    return {"no_rope_layers": turned, **_bias_keys(architecture), **_window_keys(architecture)}


_smollm3 = Family("SmolLM3ForCausalLM", _LLAMA, _SmolLM3, _smollm3_keys)


# --- GPT-NeoX, Pythia: LayerNorm, a plain MLP, attention and MLP side by side, heads that turn in part, fused q, k, v


class _GPTNeoX(ConfigJson):
    partial_rotary_factor: Number = 0.25
    rms_norm_eps: Number = 1e-5
    attention_bias: Flag = True
    use_parallel_residual: Flag = True

    def facts(self) -> Facts:
        biases = {"up", "down"} | (_ATTENTION if self.attention_bias else set())
        parallel = self.use_parallel_residual
        return {"norm": "layer", "mlp": "gelu", "parallel_residual": parallel, "biases": frozenset(biases)}


def _neox_keys(architecture: Architecture) -> Keys:
    attention = architecture.biases >= _ATTENTION
    return {"attention_bias": attention, "use_parallel_residual": architecture.parallel_residual}


_gpt_neox = Family(
    "GPTNeoXForCausalLM",
    _NEOX,
    _GPTNeoX,
    _neox_keys,
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
