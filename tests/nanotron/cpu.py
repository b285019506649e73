"""nanotron's own model and trainer on the CPU: flash_attn in plain torch, "cuda" read as "cpu", and gloo."""

import importlib.machinery
import itertools
import os
import sys
import types
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shear_tron.checkpoint.nanotron import import_nanotron


def _norm(x: Tensor, weight: Tensor, bias: None, *, eps: float, is_rms_norm: bool, **_: Any) -> Tensor:
    assert is_rms_norm
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, causal: bool, **_: Any) -> Tensor:
    ends = cu_seqlens_q.tolist()
    parts = []
    for start, end in itertools.pairwise(ends):
        one = [x[None, start:end].transpose(1, 2) for x in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*one, is_causal=causal, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


class _Rotary(nn.Module):
    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        assert interleaved
        self.dim, self.base = dim, base

    def forward(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:  # [batch, time, heads, dim], [.., 2, heads, dim]
        inverse = 1.0 / (self.base ** (torch.arange(0, self.dim, 2) / self.dim))
        angle = torch.outer(torch.arange(q.shape[1]).float(), inverse)[:, None]
        k, v = kv.unbind(2)
        return self._turn(q, angle), torch.stack((self._turn(k, angle), v), 2)

    def _turn(self, x: Tensor, angle: Tensor) -> Tensor:
        one, two = x[..., ::2], x[..., 1::2]
        turned = (one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin())
        return torch.stack(turned, -1).flatten(-2)


def _module(name: str, **content: Any) -> None:
    sys.modules[name] = module = types.ModuleType(name)
    module.__dict__.update(content)
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)


class CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value

        return function(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


def start(tp: int, pp: int) -> Any:
    """nanotron.trainer, ready for this rank of a process group of tp * pp ranks."""
    unused = SimpleNamespace()
    _module("flash_attn", bert_padding=unused, __spec__=importlib.machinery.ModuleSpec("flash_attn", None))
    _module("flash_attn.flash_attn_interface", flash_attn_varlen_func=_attention, flash_attn_with_kvcache=unused)
    _module("flash_attn.layers")
    _module("flash_attn.layers.rotary", RotaryEmbedding=_Rotary)
    _module("flash_attn.ops")
    _module("flash_attn.ops.triton")
    _module("flash_attn.ops.triton.layer_norm", layer_norm_fn=_norm)
    sys.modules["datasets"] = None  # type: ignore[assignment] # slow to import
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(tp * pp), "LOCAL_RANK": str(dist.get_rank())}
    import_nanotron()
    import nanotron.distributed
    import nanotron.trainer
    from nanotron.models.llama import RotaryEmbedding
    from nanotron.parallel.context import ParallelContext

    ParallelContext.set_device = lambda self: None
    RotaryEmbedding.init_rotary_embeddings = lambda self: None  # its model has a second one, for inference
    sums = {"AVG": dist.ReduceOp.SUM, "SUM": dist.ReduceOp.SUM, "MAX": dist.ReduceOp.MAX}  # gloo has no AVG; dp is 1
    nanotron.distributed.ReduceOp = SimpleNamespace(**sums)
    torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda *_: None
    nanotron.trainer.wandb = None
    return nanotron.trainer
