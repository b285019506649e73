"""The definitions themselves: a masked op is the op of the model that lacks what the mask closes, and torch agrees."""

from typing import Any

import pytest
import shear_kernels
import torch
import torch.nn.functional as F
from kernel_law import assert_same_bits, gates, normal, run
from shear_kernels import reference
from torch import Tensor

DOUBLE = torch.float64
KEPT = torch.arange(0, 30, 3)


def closing(units: int, kept: Tensor) -> Tensor:
    """A mask of ones and zeros, the ones at ``kept``."""
    return torch.zeros(units, device=kept.device).index_fill(0, kept, 1)


def layer_norm_inputs(mask: Tensor | None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    x = normal(4, 30, seed=1) + 0.5
    x = (x if mask is None else x * (mask != 0)).to(dtype)
    return {"x": x, "weight": normal(30, seed=2) + 1, "bias": normal(30, seed=3), "hidden_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_layer_norm_without_a_mask_is_torchs(dtype: torch.dtype) -> None:
    tensors = layer_norm_inputs(None, dtype)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor, hidden_mask: None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), (30,), weight.to(wide), bias.to(wide), 1e-5).to(x.dtype)

    ours, theirs = run(shear_kernels.masked_layer_norm, tensors, dtype), run(torchs, tensors, dtype)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_layer_norm_keeps_its_precision_far_from_zero() -> None:
    """A mean a thousand times the deviation: the mean square less the squared mean would lose all digits."""
    x = normal(3, 64, seed=1) + 1000
    truth = F.layer_norm(x.double(), (64,))
    ours = shear_kernels.masked_layer_norm(x, torch.ones(64), eps=1e-5)
    assert (ours - truth).abs().max() <= 2 * (F.layer_norm(x, (64,)) - truth).abs().max() + 1e-4


def test_masked_layer_norm_is_the_extracted_models() -> None:
    """Its weight and bias carry the gates; gradients of all but the gates agree too."""
    mask = closing(30, KEPT) * torch.linspace(0.1, 1, 30)
    tensors = layer_norm_inputs(mask, DOUBLE)
    folded = {n: t[KEPT] * mask[KEPT] for n, t in tensors.items() if n in ("weight", "bias")}
    x, weight, bias = tensors["x"], folded["weight"], folded["bias"]
    whole = run(shear_kernels.masked_layer_norm, tensors, DOUBLE)["output 0"]
    torch.testing.assert_close(whole[:, KEPT], F.layer_norm(x[:, KEPT], (10,), weight.double(), bias.double()))
    assert not whole[:, mask == 0].any()

    upstream = normal(4, 10, seed=5).double()
    big, small = x.clone().requires_grad_(), x[:, KEPT].clone().requires_grad_()
    arguments = (tensors["weight"].double(), tensors["bias"].double(), mask.double())
    shear_kernels.masked_layer_norm(big, *arguments)[:, KEPT].backward(upstream)
    F.layer_norm(small, (10,), weight.double(), bias.double()).backward(upstream)
    torch.testing.assert_close(big.grad[:, KEPT], small.grad)
    assert not big.grad[:, mask == 0].any()


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_gradcheck(bias: bool) -> None:
    mask = gates("soft", 9).double().where(torch.arange(9) != 4, 0).requires_grad_()
    x = (normal(3, 9, seed=1).double() * (mask != 0)).requires_grad_()
    weight = normal(9, seed=2).double().requires_grad_()
    given = (x, weight, normal(9, seed=3).double().requires_grad_() if bias else None)

    def op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return shear_kernels.masked_layer_norm(x * (mask.detach() != 0), weight, bias, mask.detach())

    assert torch.autograd.gradcheck(op, given)
    opened = mask.detach().clamp(min=0.1).requires_grad_()  # an open gate's gradient; a closed one's jumps
    assert torch.autograd.gradcheck(lambda m: shear_kernels.masked_layer_norm(*given[:3], m), opened)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_gelu_is_torchs_times_the_mask(approximate: Any, dtype: torch.dtype) -> None:
    x, mask = normal(5, 12, seed=1, dtype=dtype), gates("soft", 12)
    ours = reference.masked_gelu(x, mask, approximate)
    torch.testing.assert_close(ours, F.gelu(x, approximate=approximate) * mask.to(dtype))
    assert torch.equal(reference.masked_gelu(x, None, approximate), F.gelu(x, approximate=approximate))
    double = (x.double().requires_grad_(), mask.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, m: reference.masked_gelu(a, m, approximate), double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_ones_are_none_to_the_bit(dtype: torch.dtype) -> None:
    ones, tensors = torch.ones(30), layer_norm_inputs(None, dtype)
    assert_same_bits(
        run(reference.masked_layer_norm, tensors, None),
        run(reference.masked_layer_norm, tensors | {"hidden_mask": ones}, None),
    )
    x: dict[str, Tensor | None] = {"x": normal(5, 30, seed=1, dtype=dtype), "mask": None}
    assert_same_bits(run(reference.masked_gelu, x, None), run(reference.masked_gelu, x | {"mask": ones}, None))


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int, documents: list[int]) -> Tensor:
    """Attention one query at a time, one row, heads alike, over the keys that the words of the definition name."""
    out = torch.empty_like(q)
    for i in range(q.shape[1]):
        begin = max(d for d in documents if d <= i)
        keys = slice(max(begin, i - window + 1), i + 1)
        score = torch.einsum("hd,jhd->hj", q[0, i], k[0, keys]) / q.shape[-1] ** 0.5
        out[0, i] = torch.einsum("hj,jhd->hd", score.softmax(-1), v[0, keys])
    return out


@pytest.mark.parametrize("documents", [[0], [0, 5, 6, 16]])
@pytest.mark.parametrize("window", [1, 3, 20, 21, 100])
def test_window_is_the_last_keys_of_the_document(window: int, documents: list[int]) -> None:
    q, k, v = (normal(1, 21, 2, 8, seed=i).double() for i in range(3))
    cu_seqlens = torch.tensor([*documents, 21], dtype=torch.int32) if len(documents) > 1 else None
    ours = shear_kernels.masked_attention(q, k, v, cu_seqlens=cu_seqlens, window=window)
    torch.testing.assert_close(ours, by_hand(q, k, v, window, documents))


def test_window_is_mistrals() -> None:
    """By the mask that transformers makes for a sliding window."""
    masking = pytest.importorskip("transformers.masking_utils")
    overlay, window, time = masking.sliding_window_overlay(3), 3, 9
    theirs = torch.tensor([[bool(overlay(0, 0, i, j)) and j <= i for j in range(time)] for i in range(time)])
    q = torch.zeros(1, time, 1, time)
    identity = torch.eye(time)[None, :, None]  # equal scores: the output says which keys were seen
    seen = shear_kernels.masked_attention(q, q, identity, window=window)[0, :, 0] > 0
    assert torch.equal(seen, theirs)


def test_window_gradcheck() -> None:
    q, k, v = (normal(1, 6, 2, 4, seed=i).double().requires_grad_() for i in range(3))
    mask = torch.tensor([0.3, 1.0], dtype=DOUBLE, requires_grad=True)
    op = lambda *tensors: shear_kernels.masked_attention(*tensors, window=2)  # noqa: E731
    assert torch.autograd.gradcheck(op, (q, k, v, mask))


@pytest.mark.parametrize(
    ("options", "message"), [({"window": 0}, "at least 1"), ({"window": 2, "causal": False}, "looks back")]
)
def test_impossible_window_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shear_kernels.masked_attention(*(normal(1, 4, 1, 8, seed=1),) * 3, **options)


def test_partial_rotation_turns_the_first_entries_and_passes_the_rest() -> None:
    q, k, angle = normal(2, 5, 4, 16, seed=1), normal(2, 5, 2, 16, seed=2), normal(5, 3, seed=3)
    ours = shear_kernels.rope(q, k, angle.cos(), angle.sin())
    for mine, x in zip(ours, (q, k), strict=True):
        turned, _ = shear_kernels.rope(x[..., :6], x[..., :6], angle.cos(), angle.sin())
        assert torch.equal(mine[..., :6], turned)
        assert torch.equal(mine[..., 6:], x[..., 6:])
    with pytest.raises(ValueError, match="9 angles turn more than head_dim=16"):
        shear_kernels.rope(q, k, torch.ones(5, 9), torch.ones(5, 9))


def test_partial_rotation_is_neoxs() -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    q, angle = normal(1, 5, 4, 16, seed=1), normal(5, 2, seed=3)
    twice = torch.cat((angle, angle), -1)[None]
    theirs, _ = neox.apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), twice.cos(), twice.sin())
    ours, _ = shear_kernels.rope(q, q, angle.cos(), angle.sin())
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_norm_of_every_head_is_qwens() -> None:
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    norm, q = qwen.Qwen3RMSNorm(16, eps=1e-6), normal(2, 5, 3, 16, seed=1)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(shear_kernels.masked_rms_norm(q, norm.weight, None, 1e-6), norm(q))
