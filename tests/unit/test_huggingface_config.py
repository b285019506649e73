"""config.json: every spelling is read, all else is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint.huggingface import architecture_config, read_architecture
from shear_tron.shape import Shape

ARCHITECTURE = Architecture(Shape(hidden=18, layers=3, heads=6, kv_heads=3, head_dim=4, ffn=20, vocab=40, tied=True))


def save_config(folder: Path, architecture: Architecture, **changes: Any) -> None:
    """Write config.json with some keys changed, or left out where the value is ``...``."""
    config = architecture_config(architecture, torch.float32) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_sizes_and_constants_left_out_are_those_of_transformers(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 96, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = read_architecture(tmp_path), LlamaConfig(**config)
    assert ours.shape.kv_heads == theirs.num_key_value_heads == 4
    assert ours.shape.head_dim == theirs.head_dim == 16
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.context == theirs.max_position_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.shape.tied == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 7e4, "rope_scaling": None},
        {"rope_theta": 7e4, "rope_scaling": ...},
        {"rope_theta": 7e4, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    ],
)
def test_every_spelling_of_rotary_parameters(spelling: dict[str, Any], tmp_path: Path) -> None:
    save_config(tmp_path, ARCHITECTURE, **spelling)
    assert read_architecture(tmp_path).rope == Rope(theta=7e4)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_llama3_stretching_in_both_spellings(key: str, tmp_path: Path) -> None:
    architecture = replace(ARCHITECTURE, rope=Rope(theta=500000.0, factor=8.0, original_context=64))
    scaling = architecture_config(architecture, torch.float32)["rope_scaling"]
    scaling[key] = scaling.pop("rope_type")
    save_config(tmp_path, architecture, rope_scaling=scaling)
    assert read_architecture(tmp_path) == architecture


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2' is not supported; use a 'llama' model"),
        ({"model_type": ...}, "model_type=None is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None is not a positive number"),
        ({"rope_scaling": "llama3"}, "are not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' is not a positive number"),
        ({"hidden_size": ...}, "hidden_size=None is not a size"),
        ({"num_hidden_layers": 0}, "layers=0 is not a size"),
        ({"vocab_size": 32.0}, "vocab_size=32.0 is not a size"),
        ({"num_key_value_heads": 4}, "heads=6 is not a multiple of kv_heads=4"),
        ({"head_dim": ..., "hidden_size": 20}, "hidden_size=20 is no multiple of num_attention_heads=6"),
    ],
)
def test_other_models_are_refused_in_one_line(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    save_config(tmp_path, ARCHITECTURE, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        read_architecture(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_architecture(tmp_path)


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_architecture(tmp_path)
