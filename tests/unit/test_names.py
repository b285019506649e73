"""Fused tensors against layouts written out by hand."""

from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES
from torch import Tensor

from shear_tron.checkpoint.names import Packed, Stored, stored, with_biases

GROUPED = ARCHITECTURES["llama, grouped"]  # 4 key-value heads of 2 query heads of 6 rows; hidden 24
NAMES = {
    leaf: f"{leaf}.{{}}.weight"
    for leaf in ("embed", "attn_norm", "o", "mlp_norm", "gate", "up", "down", "norm", "lm_head")
}


def fused(by: str) -> Stored:
    packed = Packed("qkv.{}.weight", ("q", "k", "v"), by)
    tensors = {each.name: each for each in stored(GROUPED, {**NAMES, **dict.fromkeys("qkv", packed)})}
    assert "qkv.3.weight" in tensors
    return tensors["qkv.3.weight"]


Q, K, V = (torch.randn(rows, 24) for rows in (48, 24, 24))
BY_PART = torch.cat([Q, K, V])
BY_HEAD = torch.cat([part for head in range(4) for part in (Q[12 * head :][:12], K[6 * head :][:6], V[6 * head :][:6])])


@pytest.mark.parametrize(("by", "whole"), [("part", BY_PART), ("head", BY_HEAD)])
def test_packing_and_unpacking(by: str, whole: Tensor) -> None:
    tensor = fused(by)
    assert tensor.size == (96, 24)
    assert torch.equal(tensor.pack([Q, K, V]), whole)
    for param, leaf in zip(tensor.params, (Q, K, V), strict=True):
        assert torch.equal(tensor.unpack(whole, param), leaf)


@pytest.mark.parametrize(("by", "whole"), [("part", BY_PART), ("head", BY_HEAD)])
def test_a_slice_reads_no_more_than_its_heads(by: str, whole: Tensor) -> None:
    tensor, reads = fused(by), []

    def read(axis: int, start: int, stop: int) -> Tensor:
        reads.append((axis, start, stop))
        return whole.narrow(axis, start, stop - start)

    for param, leaf in zip(tensor.params, (Q, K, V), strict=True):
        assert torch.equal(tensor.read(read, param), leaf)
        for axis in (0, 1):
            for start in range(25):
                for stop in range(start, 25):
                    part = tensor.read_slice(read, param, axis, start, stop)
                    assert torch.equal(part, leaf.narrow(axis, start, stop - start))
    reads.clear()
    tensor.read_slice(read, tensor.params[1], 0, 7, 12)  # of the second head
    assert reads == [(0, 48 + 7, 48 + 12) if by == "part" else (0, 24, 48)]


def test_a_parameter_on_its_own_is_the_simplest_case() -> None:
    tensor = next(each for each in stored(GROUPED, {**NAMES, **dict.fromkeys("qkv", "x")}) if each.name == "o.3.weight")
    assert tensor.size == tensor.params[0].size
    weight = torch.randn(tensor.size)
    assert torch.equal(tensor.pack([weight]), weight)
    assert torch.equal(tensor.unpack(weight, tensor.params[0]), weight)


def test_biases_are_called_and_packed_like_their_weights() -> None:
    names = with_biases({"o": "a.{}.weight", "q": Packed("b.{}.weight", ("q", "k"), "head")})
    assert names["o_bias"] == "a.{}.bias"
    assert names["q_bias"] == Packed("b.{}.bias", ("q_bias", "k_bias"), "head")


def test_what_a_format_has_no_place_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.q has no name in this format"):
        list(stored(GROUPED, NAMES))
    biased = replace(GROUPED, biases=frozenset("q"))
    names = with_biases({**NAMES, **dict.fromkeys("qkv", Packed("qkv.{}.weight", ("q", "k", "v"), "part"))})
    with pytest.raises(ValueError, match=r"qkv\.\{\}\.bias holds k_bias, which this model lacks"):
        list(stored(biased, names))
    with pytest.raises(ValueError, match=r"qkv\.\{\}\.bias holds q_bias, which this model lacks"):
        list(stored(replace(GROUPED, biases=frozenset("k")), names))
