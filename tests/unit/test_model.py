"""The model against the paper authors' implementation (tests/data/masked_llama.npz) and against Hugging Face."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, random_model, tokens_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shear_tron.architecture import Architecture, Rope
from shear_tron.dims import sizes
from shear_tron.masks import Masks
from shear_tron.model.context import DENSE, Context
from shear_tron.model.transformer import DEAR, Transformer
from shear_tron.params import count, params
from shear_tron.shape import Shape

VECTORS = np.load(Path(__file__).parents[1] / "data" / "masked_llama.npz", allow_pickle=False)
META = json.loads(str(VECTORS["meta"]))
# Their name of each of our leaves, under transformer.blocks.N for those of a layer.
THEIRS = {
    "embed": "wte", "attn_norm": "ln_1", "q": "attn.wq", "k": "attn.wk", "v": "attn.wv", "o": "attn.out_proj",
    "mlp_norm": "ln_2", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "norm": "ln_f", "lm_head": "output",
}  # fmt: skip


def their_model() -> tuple[Transformer, dict[str, str]]:
    sizes = META["config"]
    shape = Shape(
        hidden=sizes["hidden"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        kv_heads=sizes["heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        ffn=sizes["intermediate"],
        vocab=sizes["vocab"],
    )
    model = Transformer(Architecture(shape, Rope(sizes["rope_theta"]), sizes["rms_eps"])).double()
    names = {}
    for param in params(model.architecture):
        block = "" if param.layer is None else f"blocks.{param.layer}."
        names[param.name] = f"transformer.{block}{THEIRS[param.row.leaf]}.weight"
        model.get_parameter(param.name).data = torch.from_numpy(VECTORS["w." + names[param.name]])
    return model, names


def their_masks() -> Masks:
    def leaf(name: str) -> Tensor:
        return torch.from_numpy(VECTORS[name]).requires_grad_()

    return Masks(hidden=leaf("hidden_z"), layers=leaf("layer_z"), kv_heads=leaf("head_z"), ffn=leaf("intermediate_z"))


def test_masked_logits_loss_and_gradients_are_those_of_the_original() -> None:
    model, names = their_model()
    masks = their_masks()
    tokens = torch.tensor(META["ids"])
    logits = model(tokens, context=Context(masks))
    torch.testing.assert_close(logits, torch.from_numpy(VECTORS["logits"]), atol=1e-6, rtol=0)
    loss = model(tokens[:, :-1], tokens[:, 1:], Context(masks)).mean()
    assert loss.item() == pytest.approx(META["loss"], abs=1e-6)
    loss.backward()
    for ours, theirs in names.items():
        torch.testing.assert_close(
            model.get_parameter(ours).grad, torch.from_numpy(VECTORS["g." + theirs]), atol=1e-6, rtol=0, msg=ours
        )
    for kind, theirs in (
        ("hidden", "hidden_z"),
        ("layers", "layer_z"),
        ("kv_heads", "head_z"),
        ("ffn", "intermediate_z"),
    ):
        mask = getattr(masks, kind)
        open_units = mask.detach() != 0  # a closed unit's gradient never reaches its logit, see tests/data/README.md
        torch.testing.assert_close(
            mask.grad[open_units], torch.from_numpy(VECTORS["grad." + theirs])[open_units], atol=1e-6, rtol=0, msg=kind
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masks_of_ones_are_no_masks_to_the_bit(name: str) -> None:
    model, tokens = random_model(ARCHITECTURES[name]), tokens_of(ARCHITECTURES[name])
    ones = Masks(**{kind: torch.ones(size) for kind, size in sizes(model.architecture.shape).items()})
    results = []
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        for context in (DENSE, Context(ones)):
            model.zero_grad()
            loss = model(tokens[:, :-1], tokens[:, 1:], context)
            loss.sum().backward()
            results.append([loss, *(p.grad for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results[-2:], strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_count_is_the_size_of_the_built_model(name: str) -> None:
    assert count(ARCHITECTURES[name]) == sum(p.numel() for p in random_model(ARCHITECTURES[name]).parameters())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(mode: str) -> None:
    plain = random_model(ARCHITECTURES["llama, grouped"])
    shape = plain.architecture.shape
    saving = Transformer(plain.architecture, checkpointing=mode).double()
    saving.load_state_dict(plain.state_dict())
    masks = Masks(
        ffn=torch.rand(shape.layers, shape.ffn), heads_per_group=torch.rand(shape.layers, shape.heads_per_group)
    )
    tokens = torch.randint(shape.vocab, (2, 9))
    for model in (plain, saving):
        model(tokens[:, :-1], tokens[:, 1:], Context(masks)).sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=0, msg=name)


class Counted(TorchDispatchMode):
    """How often each op ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_no_product_and_no_attention_again() -> None:
    """But the rest: norms, for one."""
    plain = ARCHITECTURES["llama"]
    ops = {}
    for mode in ("none", "selective", "full"):
        model = Transformer(plain, checkpointing=mode)
        with Counted() as counted:
            model(tokens_of(plain)[:, :-1], tokens_of(plain)[:, 1:]).sum().backward()
        ops[mode] = counted.ops
    dear = {op for op in ops["none"] if op in DEAR}
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= dear
    for op in dear:
        assert ops["none"][op] == ops["selective"][op] < ops["full"][op], op
    assert ops["none"]["aten::rsqrt"] < ops["selective"]["aten::rsqrt"] == ops["full"]["aten::rsqrt"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_documents_of_a_window_do_not_see_each_other(name: str) -> None:
    """Packed with their ends marked, documents have the logits that they have alone."""
    model, tokens = random_model(ARCHITECTURES[name]), tokens_of(ARCHITECTURES[name], time=12)
    ends = torch.tensor([0, 5, 12, 13, 20, 24], dtype=torch.int32)
    packed = model(tokens, context=Context(documents=ends)).flatten(0, 1)
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = model(tokens.flatten()[None, start:stop])[0]
        torch.testing.assert_close(packed[start:stop], alone, atol=1e-12, rtol=0)
    assert not torch.allclose(packed, model(tokens).flatten(0, 1))
