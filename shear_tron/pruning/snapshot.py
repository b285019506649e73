"""The gates at a glance: small enough to write down many times in a run, fine enough to see where they close."""

from typing import Any

from shear_tron.masks import Masks

BLOCKS = 64  # an axis of more units is told in this many blocks of neighbours


def snapshot(expected: Masks) -> dict[str, Any]:
    """For each kind of unit, the mean probability of being open, by layer and block of units (nested lists).

    expected: each unit's (``Method.expected``).
    Kinds of at most BLOCKS units (a layer) are told unit by unit. A 7B model's snapshot takes 20 kB of JSON.
    """
    told = {}
    for kind, probabilities in expected.items():
        blocks = probabilities.detach().tensor_split(min(BLOCKS, probabilities.shape[-1]), dim=-1)
        means = [block.mean(-1).double().tolist() for block in blocks]  # [blocks], or [blocks][layers]
        rounded = [[round(mean, 3) for mean in part] if isinstance(part, list) else round(part, 3) for part in means]
        told[kind] = [list(row) for row in zip(*rounded, strict=True)] if probabilities.ndim > 1 else rounded
    return told
