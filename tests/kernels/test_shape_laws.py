"""Properties over drawn shapes: kernel = reference. Apart from the other laws, which need no hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_law import DTYPES, MASKS, assert_lawful, gates, normal
from test_attention_laws import inputs
from test_norm_laws import LAYERS, add_inputs


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 2100), st.sampled_from(MASKS), st.sampled_from(DTYPES))
def test_swiglu(rows: int, columns: int, mask: str, dtype: torch.dtype) -> None:
    gate, up = normal(rows, columns, seed=1, dtype=dtype), normal(rows, columns, seed=2, dtype=dtype)
    assert_lawful("masked_swiglu", {"gate": gate, "up": up, "mask": gates(mask, columns, seed=rows)})


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 1500), st.sampled_from(MASKS), st.sampled_from(LAYERS), st.sampled_from(DTYPES)
)
def test_norm(rows: int, hidden: int, kind: str, layer: float | None, dtype: torch.dtype) -> None:
    assert_lawful("add_rms_norm", add_inputs((rows, hidden), kind, layer, dtype))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.integers(2, 90),  # with one key the softmax is constant, dq is 0 and the law empty
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.sampled_from([8, 32, 48]),
    st.sampled_from(MASKS),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_attention(
    batch: int, time: int, heads: tuple[int, int], head_dim: int, mask: str, causal: bool, dtype: torch.dtype
) -> None:
    assert_lawful("masked_attention", inputs(batch, time, *heads, head_dim, mask, dtype), causal=causal)
