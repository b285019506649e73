"""Configurations of nanotron: a model's, a checkpoint's progress, and the YAML of a training that goes on."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint.config_json import ConfigJson, Context, Number, Positive
from shear_tron.checkpoint.safetensors_stream import read_json
from shear_tron.reading import short
from shear_tron.shape import Shape, require_split

Flavour = Literal["0.4", "main"]
MODEL, META = "model_config.json", "checkpoint_metadata.json"
ONLY_BASE = 10000.0  # of release 0.4's rotary embedding
# Parts of main's models that are not read.
_REFUSED = (
    "moe_config", "no_rope_layer", "sliding_window_size", "rope_scaling",
    "rope_seq_len_interpolation_factor",
)  # fmt: skip
_QKV = frozenset("qkv")  # the only biases that main's Qwen2 has, and they are one tensor


class ModelConfigJson(ConfigJson):
    """What is read of a ``model_config.json``: nanotron writes all of its config, in transformers' spelling."""

    rms_norm_eps: Positive
    max_position_embeddings: Context
    rope_theta: Number = ONLY_BASE


def require(architecture: Architecture, flavour: Flavour, tp: int = 1) -> None:
    """Raise ValueError where nanotron has no such model, or it does not split over ``tp``."""
    shape, rope = architecture.shape, architecture.rope
    if shape.hidden != shape.heads * shape.head_dim:
        raise ValueError(
            f"hidden={shape.hidden} is not heads={shape.heads} times head_dim={shape.head_dim}, which nanotron takes "
            f"for granted; shear to hidden={shape.heads * shape.head_dim}"
        )
    biases = architecture.biases
    if biases and flavour == "0.4":
        raise ValueError(f"biases of {', '.join(sorted(biases))}: nanotron 0.4 has none; write for main")
    if biases and biases != _QKV:
        raise ValueError(
            f"biases of {', '.join(sorted(biases))}: nanotron has those of q, k and v, all or none; go on in another "
            "trainer"
        )
    plain = Architecture(shape, rope, architecture.norm_eps, architecture.context, architecture.family, biases=biases)
    for fact in fields(architecture):
        value = getattr(architecture, fact.name)
        if value != getattr(plain, fact.name):
            raise ValueError(f"{fact.name}={short(value)}: nanotron has no such model; go on in another trainer")
    if rope.share != 1.0:
        raise ValueError(f"rope share={rope.share:g}: nanotron turns whole heads; go on in another trainer")
    if rope.factor != 1.0:
        raise ValueError(f"rope factor={rope.factor:g}: nanotron ignores rope_scaling; go on in another trainer")
    if flavour == "0.4" and rope.theta != ONLY_BASE:
        raise ValueError(f"rope_theta={rope.theta:g}: nanotron 0.4 has {ONLY_BASE:g} only; write for main")
    for name in ("kv_heads", "ffn", "vocab"):
        require_split(name, getattr(shape, name), "tp", tp)


def model_config(architecture: Architecture, flavour: Flavour, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """nanotron's LlamaConfig of a model, as its ``model_config.json`` and the YAML of a training have it.

    With biases main's Qwen2Config: its LLaMA ignores ``attention_bias``.
    """
    shape, biased = architecture.shape, bool(architecture.biases)
    config: dict[str, Any] = {
        "is_qwen2_config" if biased else "is_llama_config": True,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": architecture.context,
        "rms_norm_eps": architecture.norm_eps,
        "hidden_act": "silu",
        "pad_token_id": None,
    }
    for key, value in token_ids.items():
        first = value[0] if isinstance(value, list) and value else value  # Llama-3 has several ends
        if isinstance(first, int):  # else nanotron's default: it takes no null
            config[key] = first
    if flavour == "main":
        config |= {"rope_theta": architecture.rope.theta, "rope_interleaved": False, "attention_bias": biased}
    return config


def read_model_config(path: Path) -> tuple[Architecture, bool]:
    """The architecture of a checkpoint's ``model_config.json``, and whether its heads' rows are neighbouring pairs.

    ValueError where the model has parts that neither a LLaMA nor, with biases, a Qwen2 has.
    """
    config = read_json(path)
    if not (config.get("is_llama_config") or config.get("is_qwen2_config")):
        raise ValueError(f"{path} describes no LLaMA (is_llama_config, is_qwen2_config); import another")
    for key in _REFUSED:
        if config.get(key):
            raise ValueError(f"{path}: {key}={short(config[key])} is not supported; use a model without")
    biased = bool(config.get("attention_bias"))
    if biased and not config.get("is_qwen2_config"):
        raise ValueError(f"{path}: attention_bias is nanotron's Qwen2's, its LLaMA ignores it; set it to false")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act={short(config['hidden_act'])} is not supported; use a model with 'silu'")
    try:
        found = ModelConfigJson.of(config, {"head_dim": None})
        heads = found.num_attention_heads
        shape = Shape(
            hidden=found.hidden_size,
            layers=found.num_hidden_layers,
            heads=heads,
            kv_heads=found.num_key_value_heads or heads,
            head_dim=found.hidden_size // heads,
            ffn=found.intermediate_size,
            vocab=found.vocab_size,
            tied=found.tie_word_embeddings,
        )
        architecture = Architecture(
            shape, Rope(theta=found.rope_theta), found.rms_norm_eps, found.max_position_embeddings
        )
        if biased:
            architecture = replace(architecture, family="qwen2", biases=_QKV)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; copy the file that nanotron saved") from None
    return architecture, bool(config.get("rope_interleaved", True))  # before September 2024 there was no choice


def token_ids(path: Path) -> dict[str, int]:
    """``bos_token_id`` and its like in a ``model_config.json``."""
    return {key: value for key, value in read_json(path).items() if key.endswith("_token_id") and value is not None}


def metas() -> dict[str, Any]:
    """Progress: none. Release 0.4 asks for the first two, main for all."""
    stage = {"name": "continue", "start_training_step": 1, "consumed_train_samples": 0}
    return {"last_train_step": 0, "consumed_train_samples": 0, "last_stage_idx": 0, "data_stages": [stage]}


def training(
    folder: Path,
    model: Mapping[str, Any],
    *,
    samples: Path,
    sequence: int,
    steps: int,
    micro_batch: int,
    accumulate: int,
    seed: int,
    optimizer: Mapping[str, Any],
) -> dict[str, Any]:
    """What main's ``run_train.py --config-file`` takes to go on from the checkpoint in ``folder``, on one rank.

    model: ``model_config.json``. samples: a folder of token shards whose path contains ``s3``, which main asserts.
    optimizer: our ``optimizer`` section, as a dictionary. folder/tokenizer must be the tokenizer.
    """
    dataset = {
        "dataset_folder": [str(samples)],
        "dataset_weights": [1.0],
        "return_positions": False,
        "use_old_brrr_dataloader": True,  # the other reader needs a datatrove that was never released
    }
    schedule = {
        "learning_rate": optimizer["learning_rate"],
        "min_decay_lr": optimizer["learning_rate"] * optimizer["min_learning_rate"],
        "lr_warmup_steps": optimizer["warmup_steps"],
        "lr_warmup_style": "linear",
        "lr_decay_style": "cosine",
    }
    adam = {
        "name": "adamW",
        "adam_beta1": optimizer["betas"][0],
        "adam_beta2": optimizer["betas"][1],
        "adam_eps": optimizer["eps"],
        "torch_adam_is_fused": True,
    }
    data = {"dataset": dataset, "seed": seed, "num_loading_workers": 1}
    return {
        "general": {"project": "shear-tron", "run": folder.name, "seed": seed, "ignore_sanity_checks": True},
        "checkpoints": {"checkpoints_path": str(folder / "checkpoints"), "checkpoint_interval": steps},
        "data_stages": [{"name": "continue", "start_training_step": 1, "data": data}],
        "logging": {"log_level": "info", "log_level_replica": "warning", "iteration_step_info_interval": 1},
        "model": {"dtype": "bfloat16", "init_method": {"path": str(folder)}, "model_config": dict(model)},
        "optimizer": {
            "accumulate_grad_in_fp32": True,
            "clip_grad": optimizer["clip"],
            "learning_rate_scheduler": schedule,
            "optimizer_factory": adam,
            "weight_decay": optimizer["weight_decay"],
            "zero_stage": 0,
        },
        "parallelism": {"dp": 1, "pp": 1, "tp": 1, "pp_engine": "1f1b", "tp_mode": "ALL_REDUCE"},
        "tokenizer": {"tokenizer_name_or_path": str(folder / "tokenizer")},
        "tokens": {
            "sequence_length": sequence,
            "train_steps": steps,
            "micro_batch_size": micro_batch,
            "batch_accumulation_per_replica": accumulate,
        },
    }
