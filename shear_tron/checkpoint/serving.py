"""What programs that serve Hugging Face folders ask of a model, read from their code (docs/formats.md says which)."""

from shear_tron.architecture import Architecture

EXLLAMAV2 = ("llama", "mistral", "qwen2", "qwen3")  # families of ours that it knows; others it reads as a LLaMA


def objections(architecture: Architecture) -> list[str]:
    """What vLLM and exllamav2 would not serve, or would compute otherwise: a line for each program that objects."""
    found = {"vLLM": _vllm(architecture), "exllamav2": _exllamav2(architecture)}
    return [f"{program}: {'; '.join(reasons)}" for program, reasons in found.items() if reasons]


def _vllm(architecture: Architecture) -> list[str]:
    size = architecture.shape.head_dim
    if size % 8 or size > 256:
        return [f"FlashAttention wants a head_dim in multiples of 8 up to 256, not {size}; another backend is slower"]
    return []


def _exllamav2(architecture: Architecture) -> list[str]:
    shape, reasons = architecture.shape, []
    if architecture.family not in EXLLAMAV2:
        reasons.append(f"does not know {architecture.family} and reads it as a LLaMA")
    if architecture.window is not None:
        reasons.append("ignores the sliding window")
    # It pads a matrix's outputs to 32, and what comes next takes them unpadded.
    widths = {
        "hidden": shape.hidden,
        "heads x head_dim": shape.heads * shape.head_dim,
        "kv_heads x head_dim": shape.kv_heads * shape.head_dim,
        "ffn": shape.ffn,
    }
    if odd := [f"{name}={size}" for name, size in widths.items() if size % 32]:
        reasons.append(f"wants widths in multiples of 32, not {', '.join(odd)}")
    return reasons
