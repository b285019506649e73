"""A uniform target of a given size: proportions of good small models, sizes that hardware and Hugging Face like."""

from collections.abc import Iterator
from dataclasses import replace
from math import log

from shear_tron.architecture import Architecture
from shear_tron.params import count
from shear_tron.shape import Shape

# (parameters, hidden, layers) of dense models that are good for their size. Their hidden / layers is what to aim at.
# SmolLM2, Qwen2.5, Llama-3.2, the paper's two, Llama-2.
GOOD = (
    (135e6, 576, 30),
    (360e6, 960, 32),
    (494e6, 896, 24),
    (1.24e9, 2048, 16),
    (1.35e9, 2048, 24),
    (1.54e9, 1536, 28),
    (1.71e9, 2048, 24),
    (2.7e9, 2560, 32),
    (3.2e9, 3072, 28),
    (6.7e9, 4096, 32),
    (13e9, 5120, 40),
)
NEAR = 0.03  # how far from the wanted number of parameters a proposal may be


def propose(model: Architecture, parameters: float, tp: int = 1) -> list[Shape]:
    """Targets of about ``parameters``, best first. Raises ValueError where there are none within 3 %.

    Heads and key-value heads shrink together or heads within groups, hidden is a multiple of 128 and of heads (which
    transformers asks of a LLaMA), ffn of 256, in small models less; all of ``tp``. Depth and width keep the proportion
    that good models of that size have, ffn the source's proportion to hidden.
    """
    source = model.shape
    if not 0 < parameters < count(model):
        raise ValueError(
            f"--parameters={parameters:.4g} is not smaller than the source's {count(model):,}; shearing only removes"
        )
    found = {shape: _distance(shape, model, parameters) for shape in _options(model, parameters, tp)}
    if not found:
        raise ValueError(
            f"no uniform target within {NEAR:.0%} of {parameters:.4g} parameters fits tp={tp}; the embedding alone has "
            f"{source.vocab * source.hidden:,} at full width, try another size"
        )
    return sorted(found, key=lambda shape: found[shape])[:3]


def _options(model: Architecture, parameters: float, tp: int) -> Iterator[Shape]:
    source = model.shape
    grain = 128 if source.hidden >= 1024 else 64 if source.hidden >= 512 else 8
    groups = [(kv, per) for kv in range(1, source.kv_heads + 1) for per in range(1, source.heads_per_group + 1)]
    if source.kv_heads < source.heads:  # grouped-query attention: keep the groups, give up queries within them
        groups = [(kv, per) for kv, per in groups if kv == source.kv_heads or per == source.heads_per_group]
    for hidden in range(grain, source.hidden + 1, grain):
        wide = round(source.heads * hidden / source.hidden)  # heads in the source's proportion to hidden
        for kv_heads, per_group in groups:
            heads = kv_heads * per_group
            if abs(heads - wide) > 1 or hidden % heads or kv_heads % tp or source.vocab % tp:
                continue
            for layers in range(max(1, source.layers // 3), source.layers + 1):
                if layers % 2 and layers != source.layers:  # so that pipelines can cut
                    continue
                bare = Shape(hidden, layers, heads, kv_heads, source.head_dim, 64, source.vocab, source.tied)
                least = count(model.resized(bare))
                each = (count(model.resized(replace(bare, ffn=128))) - least) // 64
                wanted = (parameters - least) / each + 64
                step = 256 if wanted >= 2048 else 64 if wanted >= 512 else 8
                ffn = min(source.ffn, max(step, round(wanted / step) * step))
                shape = replace(bare, ffn=ffn)
                if ffn % tp == 0 and abs(count(model.resized(shape)) / parameters - 1) <= NEAR:
                    yield shape


def _distance(shape: Shape, model: Architecture, parameters: float) -> float:
    """From the proportions aimed at: each factor of two counts 1, parameters missed by 3 % count 0.1, and so do heads
    that few ways of cutting divide."""
    return (
        0.1 * (shape.kv_heads % 4 != 0)
        + abs(log(shape.hidden / shape.layers / aspect(parameters), 2))
        + abs(log(shape.ffn / shape.hidden / (model.shape.ffn / model.shape.hidden), 2))
        + abs(log(count(model.resized(shape)) / parameters)) / NEAR * 0.1
    )


def aspect(parameters: float) -> float:
    """Hidden / layers of good models of about that size: a mean of the table's, weighted by nearness."""
    weights = [1 / (0.1 + log(parameters / size) ** 2) for size, _, _ in GOOD]
    return sum(w * hidden / layers for w, (_, hidden, layers) in zip(weights, GOOD, strict=True)) / sum(weights)
