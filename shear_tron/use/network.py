"""A finished model that computes logits: a Hugging Face folder by transformers, a nanotron checkpoint by our own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shear_tron.checkpoint.model_folder import is_nanotron, open_model
from shear_tron.model.transformer import Transformer
from shear_tron.params import count


@dataclass(frozen=True)
class Network:
    """``logits``: int64 [batch, time] on ``device`` -> [batch, time, vocab]."""

    parameters: int
    logits: Callable[[Tensor], Tensor]
    device: torch.device


def open_network(folder: str, device: str = "auto") -> Network:
    """float32 on the CPU, bfloat16 elsewhere. ValueError for a folder that is no model."""
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    if is_nanotron(folder):
        model = open_model(folder)
        ours = Transformer(model.architecture).to(dtype)
        with torch.no_grad():
            for name in model.names():
                ours.get_parameter(name).copy_(model.read(name))
        ours = ours.to(place).eval()
        return Network(count(model.architecture), ours, place)
    theirs = load_transformers(folder, dtype).to(place).eval()
    return Network(theirs.num_parameters(), lambda tokens: theirs(tokens).logits, place)


def load_transformers(folder: str, dtype: torch.dtype) -> Any:
    """The model of a Hugging Face folder, of whatever family transformers has."""
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} is no model (it has no config.json); give a Hugging Face folder")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
