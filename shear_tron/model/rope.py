"""Rotary position embeddings: the table of angles."""

import math

import torch
from torch import Tensor

from shear_tron.architecture import Rope


def rope_table(
    rope: Rope, head_dim: int, positions: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles of ``positions`` [time], each [time, head_dim / 2].

    Where ``rope.factor`` is not 1, wavelengths longer than the original context are stretched by it and those in
    between interpolated, as Llama 3.1 does.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device).to(dtype) / head_dim
    frequency = 1.0 / rope.theta**exponent
    if rope.factor != 1.0:
        wavelength = 2 * math.pi / frequency
        smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = smooth.clamp(0, 1)  # 0: long waves, stretched; 1: short waves, kept
        frequency = frequency * (smooth + (1 - smooth) / rope.factor)
    angle = torch.outer(positions.to(dtype), frequency)
    return angle.cos(), angle.sin()
