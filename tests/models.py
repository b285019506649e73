"""The models that tests are about. A family is done when one line added to ``ARCHITECTURES`` passes every law."""

from dataclasses import replace

import torch
from torch import Tensor

from shear_tron.architecture import Architecture, Rope
from shear_tron.dims import sizes
from shear_tron.masks import Masks
from shear_tron.model.transformer import Transformer
from shear_tron.shape import Shape

# Sizes that eight ranks can share in any layout: four key-value heads, 20 columns, 40 words, four layers.
GROUPED = Shape(hidden=24, layers=4, heads=8, kv_heads=4, head_dim=6, ffn=20, vocab=40)
PLAIN = replace(GROUPED, heads=4)
WIDE = Shape(hidden=32, layers=4, heads=4, kv_heads=4, head_dim=8, ffn=20, vocab=40)  # hidden = heads x head_dim
NEOX = Architecture(
    WIDE,
    Rope(share=0.25),
    family="gpt_neox",
    norm="layer",
    mlp="gelu",
    biases=frozenset({"q", "k", "v", "o", "up", "down"}),
    parallel_residual=True,
)

ARCHITECTURES = {
    "llama": Architecture(PLAIN),
    "llama, grouped": Architecture(GROUPED),
    "llama, tied": Architecture(replace(GROUPED, tied=True)),
    "llama-3.1": Architecture(GROUPED, Rope(500000.0, 8.0, 1.0, 4.0, 16), biases=frozenset({"q", "k", "v", "o"})),
    "mistral": Architecture(GROUPED, family="mistral", window=4),
    "qwen2": Architecture(
        GROUPED, family="qwen2", biases=frozenset({"q", "k", "v"}), window=3, full_layers=frozenset({0, 2})
    ),
    "qwen3": Architecture(replace(GROUPED, hidden=20), family="qwen3", qk_norm=True),
    "smollm3": Architecture(replace(GROUPED, tied=True), family="smollm3", unturned_layers=frozenset({1, 3})),
    "gpt_neox": NEOX,
    "gpt_neox, sequential, tied": replace(NEOX, shape=replace(WIDE, tied=True), parallel_residual=False),
}


def random_model(architecture: Architecture, seed: int = 0, std: float = 0.3) -> Transformer:
    """In float64; weights of norms around 1, everything else, biases included, around 0."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(architecture).double()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
        parameter.data = noise + (1.0 if name.endswith("norm") else 0.0)
    return model


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tokens_of(architecture: Architecture, batch: int = 2, time: int = 11) -> Tensor:
    return torch.randint(architecture.shape.vocab, (batch, time), generator=torch.Generator().manual_seed(5))


def kept_of(shape: Shape) -> dict[str, int]:
    """Fewer units of every kind that has more than one; what is left is a shape that transformers takes."""
    kept = {"hidden": 2 * shape.head_dim, "layers": shape.layers - 1, "kv_heads": 2, "heads_per_group": 1, "ffn": 8}
    return {kind: number for kind, number in kept.items() if number < sizes(shape)[kind][-1]}


def masks_of(shape: Shape, kept: dict[str, int], soft: bool, seed: int = 0) -> Masks:
    """Masks in float64 that keep these many units of each kind, others in every layer, of 1 or (soft) less."""
    noise = torch.Generator().manual_seed(seed)
    made = {}
    for kind, number in kept.items():
        size = sizes(shape)[kind]
        order = torch.rand(size, generator=noise, dtype=torch.float64).argsort(-1).argsort(-1)
        value = torch.rand(size, generator=noise, dtype=torch.float64) * 0.8 + 0.1 if soft else 1.0
        made[kind] = (order < number).double() * value
    return Masks(**made)


class InMemory:
    """Weights to start from, as ``shear_tron.parallel.data.Weights`` reads them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def read(self, name: str) -> Tensor:
        return self.weights[name].clone()

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        return self.weights[name].narrow(axis, start, stop - start).clone()
