"""Sizes of a LLaMA model. Source and target of a shearing are two values of one type."""

from dataclasses import asdict, dataclass, fields
from typing import Any


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def require_split(name: str, size: int, over: str, parts: int) -> None:
    """Raise ValueError unless ``size`` divides evenly into ``parts``, naming the counts that would."""
    if parts < 1 or size % parts:
        options = divisors(size)
        listed = ", ".join(map(str, options if len(options) <= 12 else [*options[:11], "..."]))
        raise ValueError(f"{name}={size} does not split over {over}={parts}; use {over} of {listed}")


@dataclass(frozen=True)
class Shape:
    """What can be pruned, and what fixes a parameter count.

    ``head_dim`` is explicit: after pruning ``hidden != heads * head_dim``. ``ffn`` is the feed-forward (intermediate)
    width. ``tied`` says that the output head is the embedding matrix.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "tied" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}={value} is not a size; use a positive whole number")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}; every key-value head serves the "
                f"same number of query heads, use heads of {self.kv_heads} times a whole number"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs, use an even number")

    @property
    def heads_per_group(self) -> int:
        """Query heads in each key-value group."""
        return self.heads // self.kv_heads

    def require_target(self, target: "Shape") -> None:
        """Raise ValueError unless ``target`` can be cut out of this shape."""
        larger = []
        for name in ("hidden", "layers", "kv_heads", "heads_per_group", "ffn"):
            source, kept = getattr(self, name), getattr(target, name)
            if kept > source:
                label = "query heads per key-value head" if name == "heads_per_group" else name
                larger.append(f"target {label}={kept} is larger than the source's {source}; use at most {source}")
        if larger:
            raise ValueError(", and ".join(larger))
        for name in ("head_dim", "vocab", "tied"):
            source, kept = getattr(self, name), getattr(target, name)
            if kept != source:
                raise ValueError(f"target {name}={kept} differs from the source's {source}; shearing keeps it")

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, layers {self.layers}, heads {self.heads} ({self.kv_heads} key-value) of "
            f"{self.head_dim}, ffn {self.ffn}, vocab {self.vocab}{', tied' * self.tied}"
        )

    def asdict(self) -> dict[str, Any]:
        return asdict(self)
