"""Every family against transformers: what it saves we read and run alike, what we write it opens strictly."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, random_model, tokens_of, weights_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.families import FAMILIES
from shear_tron.checkpoint.huggingface import Weights, architecture_config, read_architecture, write
from shear_tron.checkpoint.nanotron_config import require
from shear_tron.model.context import Context
from shear_tron.model.transformer import Transformer
from shear_tron.params import params

# Logits are of size 1 to 10. transformers' rotary angles and RMS norms are float32 even in a float64 model, unless made
# so (``InFloat64``).
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-5}


class InFloat64(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def parts_in(dtype: torch.dtype) -> Any:
    return InFloat64() if dtype == torch.float64 else nullcontext()


def opened(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    with parts_in(dtype):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def their_model(architecture: Architecture, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A random model made and saved by transformers from our config.json; biases and norms are not 0 and 1."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(architecture_config(architecture, torch.float32)))
    torch.manual_seed(0)
    with parts_in(dtype):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(folder / "saved", max_shard_size="9KB")
    return model.eval()


def ours(folder: Path, dtype: torch.dtype) -> Transformer:
    architecture = read_architecture(folder)
    weights = Weights.open(folder, architecture)
    model = Transformer(architecture).to(dtype)
    model.load_state_dict({name: weights.read(name) for name in weights.names()}, strict=True)
    return model


def deviation(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def test_every_family_has_a_subject() -> None:
    assert {architecture.family for architecture in ARCHITECTURES.values()} == set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_of_transformers_have_their_logits_here(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = their_model(ARCHITECTURES[name], tmp_path / "model", dtype)
    model = ours(tmp_path / "model/saved", dtype)
    assert model.architecture == ARCHITECTURES[name]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    tokens = tokens_of(model.architecture, time=100)
    with torch.no_grad(), parts_in(dtype):
        expected = theirs(tokens).logits
        found = deviation(model(tokens), expected)
    print(f"{name} {dtype}: {found:.2e} of {expected.abs().max():.1f}")
    assert found < CLOSE[dtype]
    assert expected.std() > 0.3  # or the comparison would say nothing


@pytest.mark.parametrize("shard_bytes", [5e9, 3000])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_opens_strictly_with_the_same_tensors(name: str, shard_bytes: float, tmp_path: Path) -> None:
    """transformers saves -> Weights -> write -> transformers: same logits, bit for bit, and the same tensors."""
    theirs = their_model(ARCHITECTURES[name], tmp_path / "model", torch.float32)
    architecture = read_architecture(tmp_path / "model/saved")
    weights = Weights.open(tmp_path / "model/saved", architecture)
    assert weights.names() == [param.name for param in params(architecture)]
    backwards = ((each, weights.read(each)) for each in reversed(weights.names()))
    write(tmp_path / "copy", architecture, backwards, shard_bytes=shard_bytes)
    assert (tmp_path / "copy/model.safetensors").exists() == (shard_bytes == 5e9)

    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(info.values())
    assert type(again) is type(theirs)
    theirs_by_name = dict(theirs.named_parameters())
    assert all(torch.equal(parameter, theirs_by_name[key]) for key, parameter in again.named_parameters())
    tokens = tokens_of(architecture, time=100)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    copy = Weights.open(tmp_path / "copy", architecture)
    assert all(torch.equal(copy.read(each), weights.read(each)) for each in weights.names())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_models_have_their_logits_in_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(ARCHITECTURES[name])
    write(tmp_path / "model", model.architecture, weights_of(model).items())
    theirs = opened(tmp_path / "model", torch.float64)
    tokens = tokens_of(model.architecture)
    with torch.no_grad(), InFloat64():
        assert deviation(theirs(tokens).logits, model(tokens)) < CLOSE[torch.float64]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nanotron_is_given_no_fact_that_it_would_ignore(name: str) -> None:
    """In a shape that it takes, plain LLaMA is all that it can go on with."""
    facts = ARCHITECTURES[name]
    facts = replace(facts, shape=replace(facts.shape, hidden=facts.shape.heads * facts.shape.head_dim))
    if facts == Architecture(facts.shape):
        require(facts, "main")
    else:
        with pytest.raises(ValueError, match="nanotron"):
            require(facts, "main")


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_window_stays_within_its_document(name: str, tmp_path: Path) -> None:
    """Documents packed into one sequence, against transformers with a mask made entry by entry."""
    model = random_model(ARCHITECTURES[name])
    facts = model.architecture
    write(tmp_path / "model", facts, weights_of(model).items())
    theirs = opened(tmp_path / "model", torch.float64, attn_implementation="eager")
    tokens, ends = tokens_of(facts, batch=1, time=24), [0, 9, 10, 24]
    document = [sum(token >= end for end in ends) for token in range(24)]
    positions = torch.tensor([[token - ends[document[token] - 1] for token in range(24)]])

    def mask(window: int) -> Tensor:
        """0 where a query sees a key, else minus infinity. [1, 1, 24, 24]"""
        seen = [[0 <= q - k < window and document[q] == document[k] for k in range(24)] for q in range(24)]
        return torch.zeros(1, 1, 24, 24, dtype=torch.float64).masked_fill(~torch.tensor(seen), -torch.inf)

    assert facts.window is not None
    near, far = mask(facts.window), mask(24)
    with torch.no_grad(), InFloat64():
        for index, layer in enumerate(theirs.model.layers):  # each with the mask of its kind
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, own=far if index in facts.full_layers else near: (
                    args,
                    {**kwargs, "attention_mask": own},
                ),
                with_kwargs=True,
            )
        expected = theirs(tokens, position_ids=positions).logits
        found = model(tokens, context=Context(documents=torch.tensor(ends, dtype=torch.int32)))
    assert deviation(found, expected) < CLOSE[torch.float64]
    assert deviation(found, model(tokens)) > 0.1  # documents matter
