"""What is said of programs that serve Hugging Face folders, where a model breaks their rules and where it does not."""

from dataclasses import replace

import pytest

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.serving import objections
from shear_tron.shape import Shape

SHEARED = Architecture(Shape(hidden=2048, layers=24, heads=16, kv_heads=16, head_dim=128, ffn=5504, vocab=32000))


def test_the_papers_models_are_served_by_all() -> None:
    assert objections(SHEARED) == []


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        (
            SHEARED.resized(replace(SHEARED.shape, ffn=5500)),
            ["exllamav2: wants widths in multiples of 32, not ffn=5500"],
        ),
        (replace(SHEARED, window=4096), ["exllamav2: ignores the sliding window"]),
        (replace(SHEARED, family="gpt_neox"), ["exllamav2: does not know gpt_neox and reads it as a LLaMA"]),
    ],
    ids=["width", "window", "family"],
)
def test_what_breaks_a_rule_is_said(architecture: Architecture, said: list[str]) -> None:
    assert objections(architecture) == said


def test_each_program_has_its_line() -> None:
    odd = Architecture(Shape(hidden=80, layers=1, heads=4, kv_heads=2, head_dim=20, ffn=64, vocab=100))
    first, second = objections(odd)
    assert first.startswith("vLLM: FlashAttention wants a head_dim in multiples of 8 up to 256, not 20")
    assert second.endswith("not hidden=80, heads x head_dim=80, kv_heads x head_dim=40")
