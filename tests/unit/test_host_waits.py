"""Between the first microbatch of a step and the last the host waits for nothing that a GPU computes.

The device is torch's ``meta``, whose tensors have no values: whatever needs one to go on (``item``, ``tolist``,
``cpu``, ``if tensor``, ``nonzero``, an index by a mask) is an error there, where on CUDA it would be a wait. What goes
the other way must go through ``sent``, which pins it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import shear_kernels
import torch
from models import ARCHITECTURES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shear_tron import keep
from shear_tron.data.tokens import document_ends
from shear_tron.model.context import Context
from shear_tron.model.readout import NEXT_TOKEN, NextToken
from shear_tron.model.split import Split
from shear_tron.model.transformer import Transformer
from shear_tron.parallel import pipeline
from shear_tron.parallel.pipeline import Engine
from shear_tron.parallel.topology import Layout, start
from shear_tron.pruning.config import PruneConfig, TargetConfig
from shear_tron.train import pruner as pruning
from shear_tron.train.pruner import Pruner
from shear_tron.transfer import sent

META = torch.device("meta")
TIME, MICROBATCHES = 6, 2


class Unsharded(Transformer):
    """A stage without FSDP, which wants weights with values; what torch does there is torch's."""

    def set_requires_gradient_sync(self, wanted: bool) -> None: ...


class Arrivals(TorchDispatchMode):
    """Fails where something comes from the host and not through ``sent``."""

    allowed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta and not self.allowed and "copy" in func.name():
            source = args[1] if func.name() == "aten::copy_" else args[0]
            if source.device.type == "cpu" and source.dim():  # numbers of the host may come along with a launch
                raise AssertionError(f"{func.name()} from the host, {tuple(source.shape)}")
        return result


@contextmanager
def on_a_device(kernels: bool) -> Iterator[None]:
    arrivals = Arrivals()

    def pinned(tensor: Tensor, device: torch.device) -> Tensor:
        arrivals.allowed = True
        moved = sent(tensor, device)
        arrivals.allowed = False
        return moved

    with (
        patch.object(pipeline, "FSDPModule", Unsharded),
        patch.object(Engine, "_gather_for_backward"),
        patch.object(keep, "sent", pinned),
        patch.object(pruning, "sent", pinned),
        patch.object(pipeline, "sent", pinned),
        patch.object(shear_kernels, "INTERPRETED", kernels),
        arrivals,
    ):
        yield


def step(name: str, readout: NextToken, tokens: Tensor, compact: bool) -> None:
    architecture = replace(ARCHITECTURES[name], shape=replace(ARCHITECTURES[name].shape, layers=2))
    shape = architecture.shape
    topology = replace(start(Layout(), torch.device("cpu")), device=META)
    with META:
        stage = Unsharded(architecture, readout=readout).float()
    target = TargetConfig(hidden=12, layers=1, heads=shape.heads // 2, kv_heads=2, ffn=8)
    prune = PruneConfig(target=target, warmup_steps=1, compact=compact, pad_to=4)
    pruner = Pruner(architecture, target.shape(shape), prune, 0, topology)
    for logits in pruner.method.gates.logits.values():  # type: ignore[attr-defined]
        logits.data -= 4.0
    engine = Engine([stage], topology, MICROBATCHES, 1, TIME, torch.float32, lambda rows: document_ends(rows, 3))
    drawn = pruner.sample(0, range(MICROBATCHES))
    losses = engine.train(tokens[:, :-1], tokens[:, 1:], drawn)
    assert losses is not None
    assert losses.shape == (1, MICROBATCHES)
    assert all(leaf.grad is not None for under in drawn.gated for _, leaf in under.masks.items())


TOKENS = torch.randint(40, (MICROBATCHES, TIME + 1), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "masked"])
@pytest.mark.parametrize("kernels", [False, True], ids=["definitions", "kernels"])
@pytest.mark.parametrize("name", ["llama, grouped", "qwen3", "gpt_neox", "mistral"])
def test_a_step_waits_for_nothing(name: str, kernels: bool, compact: bool) -> None:
    if kernels and not shear_kernels.HAVE_TRITON:
        pytest.skip("triton is not installed")
    with on_a_device(kernels):
        step(name, NEXT_TOKEN, TOKENS, compact)


class Impatient(NextToken):
    def __call__(self, states: Tensor, head: Tensor, labels: Tensor, split: Split, context: Context) -> Tensor:
        if labels[0, 0] >= 0:
            return super().__call__(states, head, labels, split, context)
        raise AssertionError


def test_a_wait_is_seen() -> None:
    """A question to the device, a search on it, and a list of indices that did not come by pinned memory."""
    there = TOKENS.to(META)
    with on_a_device(False), pytest.raises(RuntimeError, match="meta"):
        step("llama", Impatient(), TOKENS, True)
    with on_a_device(False), pytest.raises((RuntimeError, NotImplementedError), match=r"nonzero|meta"):
        step("llama", NEXT_TOKEN, there, True)
    unpinned = patch.object(keep, "sent", lambda tensor, device: tensor.to(device))
    with on_a_device(False), unpinned, pytest.raises(AssertionError, match="from the host"):
        step("llama", NEXT_TOKEN, TOKENS, True)


def test_mask_gradients_are_fetched_at_once() -> None:
    architecture = ARCHITECTURES["llama"]
    target = TargetConfig(hidden=12, layers=2, heads=2, kv_heads=2, ffn=8)
    topology, prune = start(Layout(), torch.device("cpu")), PruneConfig(target=target, warmup_steps=1)
    drawn = Pruner(architecture, target.shape(architecture.shape), prune, 0, topology).sample(0, range(3))
    for number, under in enumerate(drawn):
        for _, leaf in under.masks.items():
            leaf.grad = torch.full_like(leaf, number)
    fetch, fetched = Tensor.cpu, []
    with patch.object(Tensor, "cpu", lambda tensor: fetched.append(fetch(tensor)) or fetched[-1]):
        gradients = drawn.gradients()
    assert len(fetched) == 1
    for number, (by_kind, masks) in enumerate(zip(gradients, drawn.sampled, strict=True)):
        assert by_kind.keys() == dict(masks.items()).keys()
        for kind, grad in by_kind.items():
            assert torch.equal(grad, torch.full_like(getattr(masks, kind), number))
