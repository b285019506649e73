"""The facts of a forward pass: what a model is, without its weights."""

from dataclasses import dataclass

from shear_tron.shape import Shape


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings: base frequency and, where ``factor`` is not 1, Llama-3's stretching of long wavelengths."""

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A LLaMA model without its weights: sizes and the constants of its forward pass."""

    shape: Shape
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    context: int = 2048
