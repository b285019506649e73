"""Masked transformer ops, each with forward, backward and the gradient of its mask."""

from shear_kernels.cross_entropy import vocab_cross_entropy
from shear_kernels.reference import (
    add_rms_norm,
    gated_residual,
    masked_attention,
    masked_rms_norm,
    masked_swiglu,
    rope,
)

__all__ = [
    "add_rms_norm",
    "gated_residual",
    "masked_attention",
    "masked_rms_norm",
    "masked_swiglu",
    "rope",
    "vocab_cross_entropy",
]
