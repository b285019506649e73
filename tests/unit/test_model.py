"""The model against the paper authors' implementation (tests/data/masked_llama.npz) and against Hugging Face."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shear_tron.architecture import Architecture, Rope
from shear_tron.masks import Masks
from shear_tron.model.transformer import Transformer
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
    for param in params(shape):
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
    logits = model(tokens, masks=masks)
    torch.testing.assert_close(logits, torch.from_numpy(VECTORS["logits"]), atol=1e-6, rtol=0)
    loss = model(tokens[:, :-1], labels=tokens[:, 1:], masks=masks).mean()
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


PLAIN = Rope()


def random_model(shape: Shape, rope: Rope = PLAIN, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(Architecture(shape, rope)).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return model


SHAPES = {
    "mha": Shape(hidden=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn=48, vocab=64),
    "gqa": Shape(hidden=36, layers=2, heads=6, kv_heads=2, head_dim=8, ffn=48, vocab=64),
    "tied": Shape(hidden=36, layers=2, heads=6, kv_heads=2, head_dim=8, ffn=48, vocab=64, tied=True),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_masks_of_ones_are_no_masks_to_the_bit(shape: Shape) -> None:
    model = random_model(shape)
    tokens = torch.randint(shape.vocab, (2, 9))
    ones = Masks(
        hidden=torch.ones(shape.hidden),
        layers=torch.ones(shape.layers),
        kv_heads=torch.ones(shape.layers, shape.kv_heads),
        heads_per_group=torch.ones(shape.layers, shape.heads_per_group),
        ffn=torch.ones(shape.layers, shape.ffn),
    )
    results = []
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        for masks in (None, ones):
            model.zero_grad()
            loss = model(tokens[:, :-1], tokens[:, 1:], masks)
            loss.sum().backward()
            results.append([loss, *(p.grad for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results[-2:], strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("rope", [Rope(500000.0), Rope(500000.0, 8.0, 1.0, 4.0, 16)], ids=["plain", "llama3"])
def test_logits_are_those_of_hugging_face(shape: Shape, rope: Rope) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    parameters = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.factor != 1:
        parameters |= {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context,
        }
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        rope_parameters=parameters,
    )
    model = random_model(shape, rope).float()
    theirs = LlamaForCausalLM(config)
    weights = {param.hf: model.get_parameter(param.name).detach() for param in params(shape)}
    if shape.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights, strict=True)
    tokens = torch.randint(shape.vocab, (2, 100))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_count_is_the_size_of_the_built_model(shape: Shape) -> None:
    assert count(shape) == sum(p.numel() for p in random_model(shape).parameters())


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(mode: str) -> None:
    shape = SHAPES["gqa"]
    plain = random_model(shape)
    saving = Transformer(plain.architecture, checkpointing=mode).double()
    saving.load_state_dict(plain.state_dict())
    masks = Masks(
        ffn=torch.rand(shape.layers, shape.ffn), heads_per_group=torch.rand(shape.layers, shape.heads_per_group)
    )
    tokens = torch.randint(shape.vocab, (2, 9))
    for model in (plain, saving):
        model(tokens[:, :-1], tokens[:, 1:], masks).sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=0, msg=name)


def test_documents_of_a_window_do_not_see_each_other() -> None:
    """Packed with their ends marked, documents have the logits that they have alone."""
    shape = SHAPES["gqa"]
    model = random_model(shape)
    tokens = torch.randint(shape.vocab, (2, 12))
    ends = torch.tensor([0, 5, 12, 13, 20, 24], dtype=torch.int32)
    packed = model(tokens, documents=ends).flatten(0, 1)
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = model(tokens.flatten()[None, start:stop])[0]
        torch.testing.assert_close(packed[start:stop], alone, atol=1e-12, rtol=0)
    assert not torch.allclose(packed, model(tokens).flatten(0, 1))
