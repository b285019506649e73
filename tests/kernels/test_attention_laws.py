"""Masked attention: kernel = reference."""

from pathlib import Path
from typing import Any

import pytest
import shear_kernels
import torch
from kernel_law import DEVICE, DTYPES, MASKS, assert_lawful, assert_same_bits, gates, normal, run
from shear_kernels import attention
from torch import Tensor

DOCUMENTS = {
    "none": None,
    "inside rows": [0, 20, 67, 90, 134],  # with two rows of 67 tokens
    "across rows, open end": [0, 40, 100],
    "single tokens": [0, 1, 2, 3, 130, 134],
}


def inputs(
    batch: int, time: int, heads: int, kv_heads: int, head_dim: int, mask: str, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    return {
        "q": normal(batch, time, heads, head_dim, seed=1, dtype=dtype),
        "k": normal(batch, time, kv_heads, head_dim, seed=2, dtype=dtype),
        "v": normal(batch, time, kv_heads, head_dim, seed=3, dtype=dtype),
        "head_mask": gates(mask, heads),
    }


def cumulative(ends: list[int] | None) -> Tensor | None:
    return None if ends is None else torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def kernel(tensors: dict[str, Tensor | None], **options: Any) -> dict[str, Tensor]:
    return run(shear_kernels.masked_attention, tensors, None, backend="triton", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [True, False])
def test_masks(causal: bool, mask: str, dtype: torch.dtype) -> None:
    assert_lawful("masked_attention", inputs(2, 70, 4, 2, 32, mask, dtype), causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 24, 64, 96, 128])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    assert_lawful("masked_attention", inputs(1, 75, 2, 1, head_dim, "ones", dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 3), (5, 1)])
def test_grouped_queries(heads: int, kv_heads: int) -> None:
    assert_lawful("masked_attention", inputs(1, 40, heads, kv_heads, 32, "soft", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_key(dtype: torch.dtype) -> None:
    """The softmax is constant: out is v, and dq and dk are differences of equal numbers, 0 but for their roundings."""
    tensors = inputs(1, 1, 2, 2, 16, "none", dtype)
    found = kernel(tensors)
    assert torch.equal(found["output 0"], tensors["v"])
    assert torch.equal(found["d(v)"], normal(1, 1, 2, 16, seed=90).to(dtype))
    q, k, v, _ = tensors.values()
    terms = (found["d(v)"].float() * v).abs().sum(-1).max() * max(q.abs().max(), k.abs().max())
    for name in ("d(q)", "d(k)"):
        assert found[name].abs().max() <= terms / 2**21, name


@pytest.mark.parametrize("time", [2, 31, 32, 33, 64, 127, 129, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_length(time: int, dtype: torch.dtype) -> None:
    assert_lawful("masked_attention", inputs(1, time, 2, 1, 16, "ones", dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", list(DOCUMENTS))
@pytest.mark.parametrize("causal", [True, False])
def test_documents(causal: bool, documents: str, dtype: torch.dtype) -> None:
    cu_seqlens = cumulative(DOCUMENTS[documents])
    assert_lawful("masked_attention", inputs(2, 67, 3, 1, 32, "soft", dtype), causal=causal, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", ["none", "inside rows", "across rows, open end"])
@pytest.mark.parametrize("window", [7, 50])
def test_windows(window: int, documents: str, dtype: torch.dtype) -> None:
    """Shorter than a block and longer, in documents too."""
    cu_seqlens = cumulative(DOCUMENTS[documents])
    assert_lawful("masked_attention", inputs(2, 67, 3, 1, 32, "soft", dtype), window=window, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(("time", "window", "dtype"), [(100, 70, torch.float32), (300, 200, torch.bfloat16)])
def test_a_long_window_has_blocks_without_masks(time: int, window: int, dtype: torch.dtype) -> None:
    assert_lawful("masked_attention", inputs(1, time, 1, 1, 16, "ones", dtype), window=window)


def test_what_a_window_hides_may_be_anything() -> None:
    """Key blocks outside every query's window are not read."""
    tensors = inputs(1, 300, 2, 1, 16, "ones", torch.float32)
    v = tensors["v"]
    assert v is not None
    v[:, :64] = float("nan")
    seen = kernel(tensors, window=20)["output 0"][:, 256:]
    assert torch.isfinite(seen).all()


def test_a_document_is_alone() -> None:
    """Attention over packed documents equals attention over each by itself."""
    tensors = inputs(1, 100, 2, 1, 32, "ones", torch.float32)
    packed = kernel(tensors, cu_seqlens=cumulative([0, 37, 100]))["output 0"]
    for span in (slice(0, 37), slice(37, 100)):
        alone = kernel({n: t if t is None or n == "head_mask" else t[:, span] for n, t in tensors.items()})["output 0"]
        torch.testing.assert_close(packed[:, span], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_gradients_are_the_references(dtype: torch.dtype) -> None:
    """24 heads at once: enough gates for the law to mean something, some of them small."""
    tensors = inputs(1, 40, 24, 8, 16, "none", dtype)
    assert_lawful("masked_attention", tensors | {"head_mask": torch.linspace(0.002, 1, 24, device=DEVICE)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", ["none", "inside rows"])
def test_mask_of_ones_is_no_mask_to_the_bit(documents: str, dtype: torch.dtype) -> None:
    tensors, cu_seqlens = inputs(2, 67, 2, 1, 32, "ones", dtype), cumulative(DOCUMENTS[documents])
    masked = kernel(tensors, cu_seqlens=cu_seqlens)
    assert_same_bits(masked, kernel(tensors | {"head_mask": None}, cu_seqlens=cu_seqlens))


def test_closed_heads_are_zero_whatever_they_hold_and_touch_no_other() -> None:
    tensors = inputs(1, 40, 4, 2, 32, "ones", torch.float32)
    q, mask = tensors["q"], tensors["head_mask"]
    assert q is not None
    assert mask is not None
    mask[1] = mask[2] = 0
    clean = kernel(tensors)
    q[:, :, 1:3] = float("nan")
    dirty = kernel(tensors)
    assert_same_bits(clean, dirty)
    for name in ("output 0", "d(q)"):
        assert not dirty[name][:, :, 1:3].any()
        assert dirty[name][:, :, 0].any()


def test_strided_views_need_no_copy() -> None:
    fused = normal(2, 33, 8 * 16, seed=1).view(2, 33, 8, 16)
    q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    assert_lawful("masked_attention", {"q": q, "k": k, "v": v, "head_mask": gates("soft", 4)})


@pytest.mark.parametrize(("name", "time", "stride"), [("q", 130, 2**24 - 16), ("k", 130, 2**24 - 16), ("v", 3, 2**30)])
def test_offsets_beyond_32_bits(name: str, time: int, stride: int, tmp_path: Path) -> None:
    """Rows so far apart that the last begin 2^31 elements after the first. A sparse file."""
    size = (time + 1) * stride
    if DEVICE == "cuda":
        flat = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    else:
        flat = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=torch.bfloat16)
        (tmp_path / "rows").unlink()
    tensors = inputs(1, time, 1, 1, 16, "none", torch.bfloat16)
    far = flat.as_strided((1, time, 1, 16), (16, stride, 16, 1))
    close = tensors[name]
    assert close is not None
    far.copy_(close)
    outputs = [
        shear_kernels.masked_attention(**(tensors | {name: x}), backend="triton")  # type: ignore[arg-type]
        for x in (close, far)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(1, 4, 3, 16), "v": torch.ones(1, 4, 3, 16)}, "multiple of kv_heads"),
        ({"v": torch.ones(1, 4, 2, 16).bfloat16()}, "use one dtype"),
        ({"head_mask": torch.ones(3)}, "does not fit heads=4"),
        ({n: torch.ones(1, 4, 4, 256) for n in "qkv"}, "head_dim=256 is wider"),
    ],
)
def test_misfit_is_named(change: dict[str, Tensor], message: str) -> None:
    fit = {"q": torch.ones(1, 4, 4, 16), "k": torch.ones(1, 4, 2, 16), "v": torch.ones(1, 4, 2, 16)}
    with pytest.raises(ValueError, match=message):
        shear_kernels.masked_attention(**(fit | change), backend="triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("time", "head_dim", "documents"), [(75, 64, "none"), (67, 96, "inside rows")])
def test_descriptors_load_what_pointers_load(
    time: int, head_dim: int, documents: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with rows beyond the sequence and elements beyond the head, keys and values in one buffer."""
    q, k, v, mask = inputs(2, time, 4, 2, head_dim, "soft", dtype).values()
    k, v = torch.cat((k, v), 2).split(2, 2)  # type: ignore[arg-type]
    options = {"causal": documents == "none", "cu_seqlens": cumulative(DOCUMENTS[documents])}
    plain = shear_kernels.masked_attention(q, k, v, mask, **options, backend="triton")
    monkeypatch.setattr(attention, "DESCRIPTORS", True)
    assert attention.described(k)
    assert torch.equal(shear_kernels.masked_attention(q, k, v, mask, **options, backend="triton"), plain)


def test_descriptors_want_steps_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2, 9, 2, 24, seed=1, dtype=torch.bfloat16)
    assert not attention.described(x)  # not asked for
    monkeypatch.setattr(attention, "DESCRIPTORS", True)
    assert attention.described(x)
    assert not attention.described(normal(2, 9, 2, 20, seed=1, dtype=torch.bfloat16))
    assert not attention.described(normal(2, 9, 2, 25, seed=1, dtype=torch.bfloat16)[..., 1:])
