"""A finished model that computes logits, by transformers: a Hugging Face folder, a nanotron checkpoint, a Hub id."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shear_tron.checkpoint.huggingface_config import architecture_config, family_of
from shear_tron.checkpoint.model_folder import Model, is_nanotron, open_model
from shear_tron.checkpoint.names import stored
from shear_tron.hub import located
from shear_tron.reading import in_one_line, require_files


@dataclass(frozen=True)
class Network:
    """``logits``: int64 [batch, time] on ``device`` -> [batch, time, vocab]."""

    parameters: int
    logits: Callable[[Tensor], Tensor]
    device: torch.device


def open_network(model: str, device: str = "auto") -> Network:
    """float32 on the CPU, bfloat16 elsewhere. ValueError for what is no model, or cannot be read."""
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    network = load_transformers(model, torch.float32 if place.type == "cpu" else torch.bfloat16).to(place).eval()
    return Network(network.num_parameters(), lambda tokens: network(tokens).logits, place)


def load_transformers(model: str, dtype: torch.dtype) -> Any:
    """The model of a folder or Hub id, of whatever family transformers has."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError("a model computes by transformers here; pip install 'shear-tron[transformers]'") from None

    folder = located(model, weights=True)
    if is_nanotron(folder):
        return _filled(open_model(folder), dtype)
    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"{model} is no model (it has no config.json); give a Hugging Face folder or a Hub id")
    try:
        require_files(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever transformers comes upon in a damaged folder
        reason = in_one_line(error)
        raise ValueError(
            f"{model} cannot be opened ({reason}); fetch it again, as safetensors: pickled weights are never loaded"
        ) from None


def load_words(folder: str | Path) -> Any:
    """transformers' tokenizer of a folder. ValueError where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        require_files(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # whatever transformers comes upon in a damaged folder; a panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"the tokenizer of {folder} cannot be read ({in_one_line(error)}); fetch it again") from None


def _filled(model: Model, dtype: torch.dtype) -> Any:
    """transformers' network with the weights of ``model``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**architecture_config(model.architecture, dtype))
    network: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for tensor in stored(model.architecture, family_of(model.architecture).names):
            parts = [model.read(param.name) for param in tensor.params]
            network.get_parameter(tensor.name).copy_(tensor.pack(parts))
    return network
