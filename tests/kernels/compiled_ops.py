"""One small function that calls every op, for torch.compile to take whole: by the definitions and by the kernels."""

import shear_kernels
import torch
import torch.nn.functional as F
from kernel_law import DEVICE, gates, normal
from torch import Tensor

HIDDEN, HEADS, FFN, TIME = 32, 4, 48, 12
HEAD_DIM = HIDDEN // HEADS


def inputs() -> dict[str, Tensor]:
    """Leaves by name; masks among them, none closed, so that gradients of kernels and definitions agree."""
    sizes: dict[str, tuple[int, ...]] = {"x": (2, TIME, HIDDEN), "norm": (HIDDEN,), "bias": (HIDDEN,)}
    sizes |= {"q": (HIDDEN, HIDDEN), "k": (HIDDEN // 2, HIDDEN), "v": (HIDDEN // 2, HIDDEN), "o": (HIDDEN, HIDDEN)}
    sizes |= {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN), "head": (23, HIDDEN)}
    leaves = {name: 0.3 * normal(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    for name, units in (("hidden", HIDDEN), ("heads", HEADS), ("ffn", FFN)):
        mask = gates("soft", units)
        assert mask is not None
        leaves[name] = mask.clamp(min=0.3)
    leaves["layer"] = torch.tensor(0.7, device=DEVICE)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def every_op(w: dict[str, Tensor]) -> Tensor:
    """A transformer block and a loss that use each op of ``shear_kernels`` once or more."""
    x, hidden, layer = w["x"], w["hidden"], w["layer"]
    documents = torch.tensor([0, 5, 12, 24], dtype=torch.int32, device=x.device)
    angle = torch.arange(TIME, device=x.device)[:, None] / 10 ** torch.arange(HEAD_DIM // 4, device=x.device)
    normed = shear_kernels.masked_layer_norm(x, w["norm"], w["bias"], hidden)
    columns = torch.arange(0, HIDDEN, 2, device=x.device)
    joined = shear_kernels.select_joined([w[n] for n in "qkv"], [None] * 3, columns)
    projected = F.linear(normed[..., columns], joined).split([len(w[n]) for n in "qkv"], -1)
    q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)) for part in projected)
    q, k = shear_kernels.rope(q, k, angle.cos(), angle.sin())
    attended = shear_kernels.masked_attention(q, k, v, w["heads"], cu_seqlens=documents, window=4)
    attended = attended + shear_kernels.masked_attention(q, k, v, w["heads"])
    x, normed = shear_kernels.add_rms_norm(x, F.linear(attended.flatten(2), w["o"]), w["norm"], hidden, layer)
    rows = torch.arange(0, FFN, 2, device=x.device)
    gate, up = (shear_kernels.select(w[n], rows, row_scale=w["ffn"][rows], column_scale=hidden) for n in ("gate", "up"))
    fed = shear_kernels.masked_swiglu(F.linear(normed, gate), F.linear(normed, up), w["ffn"][rows])
    fed = shear_kernels.masked_gelu(fed, w["ffn"][rows])
    x = shear_kernels.gated_residual(x, F.linear(fed, shear_kernels.select(w["down"], None, rows)), hidden, layer)
    normed = shear_kernels.masked_rms_norm(x, w["norm"], hidden)
    labels = torch.arange(2 * TIME, device=x.device) % 23
    return shear_kernels.vocab_cross_entropy(normed.flatten(0, 1), w["head"], labels, chunk=10).mean()


def loss_and_gradients(op: object) -> dict[str, Tensor]:
    leaves = inputs()
    loss = op(leaves)  # type: ignore[operator]
    return {"loss": loss.detach()} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_compiles(backend: str) -> None:
    """One graph, no break; the same loss and gradients."""
    torch._dynamo.reset()
    plain = loss_and_gradients(every_op)
    compiled = loss_and_gradients(torch.compile(every_op, fullgraph=True, backend=backend))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
