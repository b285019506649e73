"""Sizes of well-known models, so that a shearing can be planned before anything is downloaded."""

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.model_folder import is_here, read_architecture
from shear_tron.hub import is_id
from shear_tron.shape import Shape
from shear_tron.train.config import RunConfig

SHAPES = {
    "llama-2-7b": Shape(4096, 32, 32, 32, 128, 11008, 32000),
    "llama-2-13b": Shape(5120, 40, 40, 40, 128, 13824, 32000),
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256),
    "llama-3.2-3b": Shape(3072, 28, 24, 8, 128, 8192, 128256, tied=True),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "tinyllama-1.1b": Shape(2048, 22, 32, 4, 64, 5632, 32000),
    "smollm2-1.7b": Shape(2048, 24, 32, 32, 64, 8192, 49152, tied=True),
    "smollm2-135m": Shape(576, 30, 9, 3, 64, 1536, 49152, tied=True),
}


def architecture(model: str) -> Architecture:
    """Of a folder or Hub id, or of a model known by name. Raises ValueError where it is none of them."""
    if is_id(model) or is_here(model):
        return read_architecture(model)
    if model.lower() in SHAPES:
        return Architecture(SHAPES[model.lower()], context=4096)
    raise ValueError(f"--model={model} holds no config.json and is not known by name; known are {', '.join(SHAPES)}")


def teacher(config: RunConfig) -> Architecture | None:
    """Of the model that a run distils from at every step; None where it reads a cache, or distils from none."""
    distill = config.distill
    return architecture(distill.teacher) if distill and distill.teacher and not distill.cache else None
