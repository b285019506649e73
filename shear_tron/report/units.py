"""What is pruned as a reader knows it, and numbers as a reader likes them."""

SPARSITIES = {
    "": "layer parameters",
    "hidden": "hidden",
    "layers": "layers",
    "kv_heads": "kv heads",
    "heads_per_group": "heads per group",
    "ffn": "ffn",
}


def short(number: float) -> str:
    """Three digits and a letter: 134.5 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def memory(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
