"""One door for models: a folder (or file) of whatever format, or a Hub id; read by our names or written from them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import gguf, huggingface, nanotron
from shear_tron.checkpoint.huggingface_config import TOKEN_IDS
from shear_tron.checkpoint.nanotron_config import MODEL, Flavour, read_model_config, require
from shear_tron.checkpoint.safetensors_stream import read_json
from shear_tron.hub import located

Format = Literal["huggingface", "nanotron", "gguf"]


class Model(Protocol):
    """Weights that are read when asked for, by our names and in our order of rows."""

    @property
    def architecture(self) -> Architecture: ...

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Form:
    """How a model is to be written. ``dtype`` is a torch dtype's name, for GGUF also q8_0; None keeps what the tensors
    have. ``flavour`` and ``tp`` (pieces of every cut tensor) are nanotron's."""

    format: Format = "huggingface"
    dtype: str | None = "float32"
    flavour: Flavour = "main"
    tp: int = 1


def open_model(model: str | Path) -> Model:
    """The model in a Hugging Face folder or a nanotron checkpoint, or of a Hub id, found whole.

    ValueError where it is none of them, or cannot be fetched.
    """
    folder = _folder(model, weights=True)
    if is_nanotron(folder):
        return nanotron.Checkpoint.open(folder)
    return huggingface.Weights.open(folder, huggingface.read_architecture(folder))


def read_architecture(model: str | Path) -> Architecture:
    """The architecture of what ``open_model`` opens. Reads, and of a Hub id fetches, no weights."""
    folder = _folder(model)
    if is_nanotron(folder):
        return read_model_config(folder / MODEL)[0]
    return huggingface.read_architecture(folder)


def _folder(model: str | Path, weights: bool = False) -> Path:
    folder = Path(located(str(model), weights))
    if not folder.exists():
        raise ValueError(
            f"{model} is not there; give a Hugging Face folder, a nanotron checkpoint, or a Hub id (org/name; "
            "hf://org/name where a folder is called org)"
        )
    return folder


def is_here(model: str) -> bool:
    """Whether ``model`` can be read without fetching anything."""
    folder = Path(located(model, fetch=False))
    return (folder / "config.json").exists() or is_nanotron(folder)


def is_nanotron(folder: str | Path) -> bool:
    return (Path(folder) / MODEL).exists()


def require_form(architecture: Architecture, form: Form) -> None:
    """Raise ValueError where a model of ``architecture`` cannot be written so. Reads and writes nothing."""
    if form.dtype == "q8_0" and form.format != "gguf":
        raise ValueError(f"dtype=q8_0 is GGUF's; for {form.format} use float32, bfloat16 or float16")
    if form.format == "nanotron":
        require(architecture, form.flavour, form.tp)
    elif form.format == "gguf":
        gguf.require(architecture)
    else:
        huggingface.architecture_config(architecture, torch.float32)


def write_model(
    folder: str | Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    form: Form,
    tokenizer_from: str | Path,
) -> str:
    """Write a model whole or not at all. Returns what was checked of it, or nothing.

    tensors: (our name, tensor), each once. tokenizer_from: a folder with tokenizer files, and with special ids in a
    config.json if there is one.
    Raises ValueError for what the format lacks and where ``folder`` holds something.
    """
    if form.format == "gguf":
        gguf.write(folder, architecture, tensors, kind=gguf.kind(form.dtype), tokenizer_from=tokenizer_from)
        return ""
    dtype = None if form.dtype is None else getattr(torch, form.dtype)
    if form.format == "nanotron":
        like = Path(tokenizer_from) / "config.json"
        config = read_json(like) if like.exists() else {}
        ids = {key: config.get(key) for key in TOKEN_IDS}
        nanotron.write(folder, architecture, tensors, flavour=form.flavour, dtype=dtype, tp=form.tp, token_ids=ids)
        return nanotron.check(folder)
    huggingface.write(folder, architecture, tensors, dtype=dtype, tokenizer_from=tokenizer_from)
    return ""
