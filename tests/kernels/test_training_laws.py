"""A whole tiny masked model trains the same steps with the kernels and with their definitions."""

import pytest
import shear_kernels
import torch
import torch.nn.functional as F
from kernel_law import DEVICE, normal
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS, TIME = 24, 4, 2, 8, 40, 31, 2, 13


def parameters() -> dict[str, Tensor]:
    shapes = {"embed": (VOCAB, HIDDEN), "head": (VOCAB, HIDDEN), "norm": (HIDDEN,), "hidden": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"{i}.q": (HEADS * HEAD_DIM, HIDDEN), f"{i}.o": (HIDDEN, HEADS * HEAD_DIM)}
        shapes |= {f"{i}.{n}": (KV_HEADS * HEAD_DIM, HIDDEN) for n in "kv"}
        shapes |= {f"{i}.gate": (FFN, HIDDEN), f"{i}.up": (FFN, HIDDEN), f"{i}.down": (HIDDEN, FFN)}
        shapes |= {f"{i}.norm": (2, HIDDEN), f"{i}.heads": (HEADS,), f"{i}.ffn": (FFN,), f"{i}.layer": (1,)}
    drawn = {name: 0.3 * normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    for name, value in drawn.items():  # gates: logits whose clamp closes about a third
        if "norm" in name:
            value.add_(1)
        elif name.split(".")[-1] in ("hidden", "heads", "ffn", "layer"):
            value.mul_(4).add_(0.6)
    return {name: value.requires_grad_() for name, value in drawn.items()}


def loss(p: dict[str, Tensor], tokens: Tensor, backend: str) -> Tensor:
    b: dict[str, object] = {"backend": backend}
    hidden = p["hidden"].clamp(0, 1)
    angle = torch.arange(TIME, device=DEVICE)[:, None] / 100 ** (torch.arange(HEAD_DIM // 2, device=DEVICE) / 4)
    x = F.embedding(tokens[:, :-1], p["embed"]) * hidden
    normed = shear_kernels.masked_rms_norm(x, p["0.norm"][0], hidden, **b)  # type: ignore[arg-type]
    for i in range(LAYERS):
        layer = p[f"{i}.layer"][0].sigmoid()
        q, k, v = (F.linear(normed, p[f"{i}.{n}"]).unflatten(-1, (-1, HEAD_DIM)) for n in "qkv")
        q, k = shear_kernels.rope(q, k, angle.cos(), angle.sin(), **b)  # type: ignore[arg-type]
        out = shear_kernels.masked_attention(q, k, v, p[f"{i}.heads"].clamp(0, 1), **b)  # type: ignore[arg-type]
        out = F.linear(out.flatten(-2), p[f"{i}.o"])
        x, normed = shear_kernels.add_rms_norm(x, out, p[f"{i}.norm"][1], hidden, layer, **b)  # type: ignore[arg-type]
        gate, up = F.linear(normed, p[f"{i}.gate"]), F.linear(normed, p[f"{i}.up"])
        fed = shear_kernels.masked_swiglu(gate, up, p[f"{i}.ffn"].clamp(0, 1), **b)  # type: ignore[arg-type]
        weight = p["norm"] if i == LAYERS - 1 else p[f"{i + 1}.norm"][0]
        fed = F.linear(fed, p[f"{i}.down"])
        x, normed = shear_kernels.add_rms_norm(x, fed, weight, hidden, layer, **b)  # type: ignore[arg-type]
    return shear_kernels.vocab_cross_entropy(normed.flatten(0, 1), p["head"], tokens[:, 1:].flatten(), chunk=8).mean()


def train(backend: str, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    p = parameters()
    generator, losses = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        tokens = torch.randint(0, VOCAB, (2, TIME + 1), generator=generator).to(DEVICE)
        value = loss(p, tokens, backend)
        gradients = torch.autograd.grad(value, list(p.values()))
        with torch.no_grad():
            for parameter, gradient in zip(p.values(), gradients, strict=True):
                parameter -= 0.1 * gradient
        losses.append(value.item())
    return losses, p


def test_training_with_kernels_is_training_with_definitions() -> None:
    kernel_losses, kernel = train("triton", 5)
    plain_losses, plain = train("reference", 5)
    assert plain_losses[0] != plain_losses[-1]
    assert any((plain[name] <= 0).any() for name in ("0.ffn", "1.ffn")), "no gate is closed"
    assert kernel_losses == pytest.approx(plain_losses, rel=1e-5)
    start = parameters()
    for name, value in plain.items():
        torch.testing.assert_close(kernel[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(value, start[name]) or name.endswith("heads"), f"{name} did not move"
