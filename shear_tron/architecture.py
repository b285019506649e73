"""The facts of a forward pass: what a model is, without its weights.

A family of models is names and a translation of its config.json (``shear_tron.checkpoint``); everything that its
forward does differently is a fact here, and one network reads them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shear_tron.shape import Shape


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings: base frequency and, where ``factor`` is not 1, Llama-3's stretching of long wavelengths.

    ``share``: of each head's entries, the first that turn (GPT-NeoX: a quarter).
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    share: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """A model without its weights: sizes, and the facts and constants of its forward pass.

    Layers are counted from 0; a fact of single layers follows them when others are pruned (``keep_layers``).
    """

    shape: Shape
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    context: int = 2048  # longest sequence
    family: str = "llama"  # whose names and config.json a Hugging Face folder of it has
    norm: Literal["rms", "layer"] = "rms"  # layer: mean taken off, and a bias
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    biases: frozenset[str] = frozenset()  # matrices of a layer that have one, by leaf
    qk_norm: bool = False  # q and k pass an RMS norm over each head before they turn
    parallel_residual: bool = False  # attention and MLP read the same stream, each behind its own norm
    window: int | None = None  # tokens that a query sees, itself included; None: all before it
    full_layers: frozenset[int] = frozenset()  # layers that see all in spite of ``window``
    unturned_layers: frozenset[int] = frozenset()  # layers without rotary embedding

    def keep_layers(self, shape: Shape, kept: Sequence[int]) -> "Architecture":
        """The architecture of a model of ``shape`` that has the layers ``kept`` of this one, in their order."""

        def renumbered(layers: frozenset[int]) -> frozenset[int]:
            return frozenset(new for new, old in enumerate(kept) if old in layers)

        return replace(
            self,
            shape=shape,
            full_layers=renumbered(self.full_layers),
            unturned_layers=renumbered(self.unturned_layers),
        )

    def resized(self, shape: Shape) -> "Architecture":
        """As ``keep_layers`` where it is not known which stay: good for counts, names and checks."""
        return self.keep_layers(shape, range(shape.layers))
