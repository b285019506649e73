"""config.json: every spelling is read, all else is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from transformers import AutoConfig

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint.families import FAMILIES
from shear_tron.checkpoint.huggingface import architecture_config, read_architecture

LLAMA, QWEN2, SMOLLM3, NEOX = (ARCHITECTURES[name] for name in ("llama, tied", "qwen2", "smollm3", "gpt_neox"))


def save_config(folder: Path, architecture: Architecture, **changes: Any) -> None:
    """Write config.json with some keys changed, or left out where the value is ``...``."""
    config = architecture_config(architecture, torch.float32) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_in_the_spellings_of_transformers_4_and_5(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    save_config(tmp_path, architecture)  # version 4's
    assert read_architecture(tmp_path) == architecture
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "5")
    assert "rope_parameters" in json.loads((tmp_path / "5/config.json").read_text())
    assert read_architecture(tmp_path / "5") == architecture


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_what_transformers_takes_it_for(family: str, tmp_path: Path) -> None:
    config = {"model_type": family, "hidden_size": 64, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"intermediate_size": 96, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = read_architecture(tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert ours.shape.kv_heads == getattr(theirs, "num_key_value_heads", 32)
    assert ours.shape.head_dim == getattr(theirs, "head_dim", 2)
    assert ours.shape.tied == theirs.tie_word_embeddings
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", None) or theirs.layer_norm_eps
    assert ours.context == theirs.max_position_embeddings
    assert ours.rope == Rope(
        theta=theirs.rope_parameters["rope_theta"], share=theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    )
    assert ours.window == getattr(theirs, "sliding_window", None)
    unturned = [layer for layer, turns in enumerate(getattr(theirs, "no_rope_layers", [])) if not turns]
    assert sorted(ours.unturned_layers) == unturned
    theirs.save_pretrained(tmp_path / "saved")  # every default written out
    assert read_architecture(tmp_path / "saved") == ours


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
    save_config(tmp_path, LLAMA, **spelling)
    assert read_architecture(tmp_path).rope == Rope(theta=7e4)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_llama3_stretching_in_both_spellings(key: str, tmp_path: Path) -> None:
    architecture = replace(LLAMA, rope=Rope(theta=500000.0, factor=8.0, original_context=64))
    scaling = architecture_config(architecture, torch.float32)["rope_scaling"]
    scaling[key] = scaling.pop("rope_type")
    save_config(tmp_path, architecture, rope_scaling=scaling)
    assert read_architecture(tmp_path) == architecture


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("architecture", "changes", "window", "full"),
    [
        (QWEN2, {"layer_types": ..., "max_window_layers": 3}, 3, {0, 1, 2}),
        (QWEN2, {"layer_types": ..., "max_window_layers": 0}, 3, set()),
        (QWEN2, {"layer_types": ..., "max_window_layers": 4}, None, set()),
        (QWEN2, {"layer_types": ..., "max_window_layers": 0, "use_sliding_window": False}, None, set()),
        (QWEN2, {"layer_types": ..., "max_window_layers": 0, "sliding_window": None}, None, set()),
        (QWEN2, {"layer_types": [FULL] * 4}, None, set()),
        (SMOLLM3, {"use_sliding_window": True, "sliding_window": 5}, 5, {0, 2}),  # layers that turn see all
        (ARCHITECTURES["mistral"], {"sliding_window": None}, None, set()),
    ],
)
def test_windows(
    architecture: Architecture, changes: dict[str, Any], window: int | None, full: set[int], tmp_path: Path
) -> None:
    save_config(tmp_path, architecture, **changes)
    found = read_architecture(tmp_path)
    assert (found.window, found.full_layers) == (window, full)
    theirs = AutoConfig.from_pretrained(tmp_path)
    if hasattr(theirs, "layer_types"):
        expected = {layer for layer, kind in enumerate(theirs.layer_types) if kind == FULL}
        assert expected == (set(range(4)) if window is None else full)


@pytest.mark.parametrize(("every", "unturned"), [(4, {3}), (2, {1, 3}), (5, set())])
def test_layers_without_rotary_embedding_by_interval(every: int, unturned: set[int], tmp_path: Path) -> None:
    save_config(tmp_path, SMOLLM3, no_rope_layers=..., no_rope_layer_interval=every)
    assert read_architecture(tmp_path).unturned_layers == unturned


@pytest.mark.parametrize(
    ("architecture", "changes", "match"),
    [
        (LLAMA, {"model_type": "bert"}, "model_type='bert' is not supported; use one of llama, mistral"),
        (LLAMA, {"model_type": "olmo2"}, r"model_type='olmo2' is not supported \(it norms q and k over all heads"),
        (LLAMA, {"model_type": ...}, "model_type=None is not supported"),
        (LLAMA, {"model_type": ["llama"]}, "is not supported"),
        (LLAMA, {"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts is not supported"),
        (LLAMA, {"model_type": "qwen3_moe", "num_experts": 128}, "a mixture of experts is not supported"),
        (LLAMA, {"model_type": "t5", "is_encoder_decoder": True}, "an encoder-decoder is not supported"),
        (LLAMA, {"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "soft cap"),
        (LLAMA, {"attention_bias": "yes"}, "attention_bias='yes': Input should be a valid boolean"),
        (LLAMA, {"rope_interleaved": True}, "rotary pairs of neighbours are not supported"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; use a llama model with 'silu'"),
        (NEOX, {"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not supported; use a gpt_neox model with 'gelu'"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type='linear': Input should be 'default' or 'llama3'",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.rope_type='yarn': Input should be",
        ),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_type='llama3' needs low_freq_factor, high_freq_factor, orig",
        ),
        (LLAMA, {"rope_scaling": "llama3"}, "is not an object"),
        (LLAMA, {"rope_parameters": {FULL: {"rope_type": "default"}}}, "rope_parameters: one by kind of layer is not"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (NEOX, {"rotary_pct": 0.4}, r"rotary_pct=0.4 of head_dim=8 is not supported"),
        (NEOX, {"rotary_pct": 2.0}, "rotary_pct=2.0 of head_dim=8 is not supported"),
        (NEOX, {"layer_norm_eps": None}, None),
        (NEOX, {"layer_norm_eps": -1}, "layer_norm_eps=-1: Input should be greater than 0"),
        (LLAMA, {"rms_norm_eps": "small"}, "rms_norm_eps='small': Input should be a valid number"),
        (LLAMA, {"rms_norm_eps": 10**400}, "is not JSON|should be a valid number"),
        (LLAMA, {"rope_theta": float("nan")}, "NaN is no number"),
        (LLAMA, {"rope_theta": float("inf")}, "Infinity is no number"),
        (LLAMA, {"anything": float("-inf")}, "-Infinity is no number"),
        (LLAMA, {"hidden_size": ...}, "hidden_size is missing; it has no default"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0: Input should be greater than or equal"),
        (
            LLAMA,
            {"num_hidden_layers": 2**31},
            "num_hidden_layers=2147483648: .* less than or equal to 10000",
        ),
        (
            QWEN2,
            {"num_hidden_layers": 2**31},
            "num_hidden_layers=2147483648: .* less than or equal to 10000",
        ),
        (
            SMOLLM3,
            {"num_hidden_layers": 2**31},
            "num_hidden_layers=2147483648: .* less than or equal to 10000",
        ),
        (LLAMA, {"vocab_size": 2**40}, "vocab_size=1099511627776: Input should be less than"),
        (LLAMA, {"vocab_size": 32.0}, "vocab_size=32.0: Input should be a valid integer"),
        (
            LLAMA,
            {"tie_word_embeddings": 1, "vocab_size": ..., "head_dim": 0},
            "3 problems: .*head_dim=0.*vocab_size",
        ),
        (NEOX, {"layer_norm_eps": -1, "rotary_pct": "x"}, "2 problems: .*layer_norm_eps=-1.*rotary_pct='x'"),
        (LLAMA, {"num_key_value_heads": 3}, "heads=8 is not a multiple of kv_heads=3"),
        (LLAMA, {"head_dim": ..., "hidden_size": 20}, "hidden_size=20 is no multiple of num_attention_heads=8"),
        (QWEN2, {"layer_types": [FULL]}, "layer_types lists 1 layers of num_hidden_layers=4; list each"),
        (
            QWEN2,
            {"layer_types": [FULL] * 3 + ["chunked_attention"]},
            "layer_types.3='chunked_attention': ",
        ),
        (QWEN2, {"use_sliding_window": False}, "layer_types has sliding_attention without a window"),
        (QWEN2, {"sliding_window": 0}, "sliding_window=0: Input should be greater than or equal"),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers lists 2 layers of num_hidden_layers=4; list each"),
    ],
)
def test_other_models_are_refused_in_one_line(
    architecture: Architecture, changes: dict[str, Any], match: str | None, tmp_path: Path
) -> None:
    save_config(tmp_path, architecture, **changes)
    if match is None:  # null is the default
        assert read_architecture(tmp_path) == architecture
        return
    with pytest.raises(ValueError, match=match) as caught:
        read_architecture(tmp_path)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("llama, grouped", {"window": 3}, "window=3 cannot be said in a config.json of llama"),
        ("llama, grouped", {"biases": frozenset({"q"})}, "biases=.* cannot be said in a config.json of llama"),
        ("llama, grouped", {"rope": Rope(share=0.5)}, "share=0.5 cannot be said|rope=.* cannot be said"),
        ("mistral", {"full_layers": frozenset({1})}, "full_layers=.* cannot be said in a config.json of mistral"),
        ("qwen2", {"parallel_residual": True}, "parallel_residual=True cannot be said in a config.json of qwen2"),
        ("gpt_neox", {"mlp": "swiglu"}, "mlp='swiglu' cannot be said in a config.json of gpt_neox"),
        ("gpt_neox", {"shape": replace(NEOX.shape, kv_heads=2)}, "kv_heads=2 cannot be said"),
        ("gpt_neox", {"shape": replace(NEOX.shape, head_dim=6)}, "head_dim=6 cannot be said"),
        ("gpt_neox", {"shape": replace(NEOX.shape, hidden=30)}, "hidden=30 is no multiple of heads=4"),
        ("llama, grouped", {"shape": replace(LLAMA.shape, hidden=20)}, "hidden=20 is no multiple of heads=8"),
        ("llama, grouped", {"family": "bert"}, "family='bert' is not known; use one of llama"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(name: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        architecture_config(replace(ARCHITECTURES[name], **changes), torch.float32)
    assert "\n" not in str(caught.value)


def test_only_families_whose_class_asks_for_it_want_hidden_to_be_whole_heads(tmp_path: Path) -> None:
    """Against transformers itself: fails when they lift the rule or lay it on another family."""
    for family, facts in FAMILIES.items():
        config = {"model_type": family, "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 8}
        config |= {"num_key_value_heads": 8, "head_dim": 6, "intermediate_size": 8, "vocab_size": 8}
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            AutoConfig.from_pretrained(tmp_path)
        except Exception:
            assert facts.hidden_is_whole_heads, family
        else:
            assert not facts.hidden_is_whole_heads, family


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        read_architecture(tmp_path)


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_architecture(tmp_path)
