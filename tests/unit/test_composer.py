"""State dicts of the paper's released code: taken over as they are, or cut as that code's own masks say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shear_tron import cli
from shear_tron.architecture import Architecture
from shear_tron.checkpoint.composer import Composer
from shear_tron.checkpoint.huggingface import Weights, architecture_config, read_architecture
from shear_tron.model.transformer import Transformer
from shear_tron.shape import Shape

SHAPE = Shape(hidden=32, layers=3, heads=4, kv_heads=4, head_dim=8, ffn=20, vocab=40)
TARGET = {"hidden": 24, "layers": 2, "heads": 3, "ffn": 12}
LIKE = Architecture(SHAPE, norm_eps=1e-5, context=64)


def state(shape: Shape = SHAPE) -> dict[str, Tensor]:
    """As the released code saves it: names and layout of its own, rotary frequencies among them."""
    noise = torch.Generator().manual_seed(0)
    hidden, ffn = shape.hidden, shape.ffn
    rows = shape.heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {"model.transformer.wte.weight": (shape.vocab, hidden)}
    for i in range(shape.layers):
        block = f"model.transformer.blocks.{i}"
        sizes |= {f"{block}.ln_1.weight": (hidden,), f"{block}.attn.rotary_emb.inv_freq": (4,)}
        sizes |= {f"{block}.attn.{name}.weight": (rows, hidden) for name in ("wq", "wk", "wv")}
        sizes |= {f"{block}.attn.out_proj.weight": (hidden, rows), f"{block}.ln_2.weight": (hidden,)}
        sizes |= {f"{block}.mlp.{name}.weight": (ffn, hidden) for name in ("gate_proj", "up_proj")}
        sizes |= {f"{block}.mlp.down_proj.weight": (hidden, ffn)}
    sizes |= {"model.transformer.ln_f.weight": (hidden,), "model.transformer.output.weight": (shape.vocab, hidden)}
    return {
        name: 0.3 * torch.randn(size, generator=noise) + (1.0 if ".ln_" in name else 0.0)
        for name, size in sizes.items()
    }


def masks() -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(1)
    sizes = {"hidden": (32,), "layer": (3,), "head": (3, 4), "intermediate": (3, 20)}
    logits = {f"model.l0_module.masks.{name}.z_loga": 2 * torch.randn(s, generator=noise) for name, s in sizes.items()}
    return logits | {"model.l0_module.lambdas.lambda_1_head": torch.tensor(0.1)}


@pytest.fixture
def like(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(architecture_config(LIKE, torch.float32)))
    model = {"type": "WordLevel", "vocab": {str(i): i for i in range(40)}, "unk_token": "0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return folder


def run(tmp_path: Path, content: Any, *options: str) -> int:
    torch.save(content, tmp_path / "weights.pt")
    given = ["import", str(tmp_path / "weights.pt"), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "llama")]
    return cli.main([*given, *options])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_is_taken_over_to_the_bit(wrapped: bool, like: Path, tmp_path: Path) -> None:
    weights = state()
    assert run(tmp_path, {"state": {"model": weights}} if wrapped else weights) == 0
    assert read_architecture(tmp_path / "out") == LIKE
    read = Weights.open(tmp_path / "out", LIKE)
    assert torch.equal(read.read("layers.1.k"), weights["model.transformer.blocks.1.attn.wk.weight"])
    assert torch.equal(read.read("lm_head"), weights["model.transformer.output.weight"])
    assert torch.equal(read.read("norm"), weights["model.transformer.ln_f.weight"])
    assert torch.equal(read.read("layers.2.down"), weights["model.transformer.blocks.2.mlp.down_proj.weight"])


def released(weights: dict[str, Tensor], logits: dict[str, Tensor], tokens: Tensor, target: dict[str, int]) -> Tensor:
    """The released code's masked forward on masks without noise, written down from its modules, loop by loop."""

    def z(values: Tensor, keep: int) -> Tensor:
        soft = torch.sigmoid(values / (2 / 3) * 0.8)
        soft[torch.topk(soft, len(values) - keep, largest=False).indices] = 0
        return soft

    of = {name.split(".")[3]: tensor for name, tensor in logits.items() if name.endswith("z_loga")}
    hidden, layer = z(of["hidden"], target["hidden"]), z(of["layer"], target["layers"])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        kept = x[..., hidden != 0]
        return weight * (x * torch.rsqrt(kept.square().mean(-1, keepdim=True) + 1e-5)) * hidden

    def turned(x: Tensor) -> Tensor:  # [batch, heads, time, 8]: halves
        angle = torch.outer(torch.arange(x.shape[2]).float(), 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8))
        cos, sin = angle.cos(), angle.sin()
        one, two = x.chunk(2, -1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

    x = weights["model.transformer.wte.weight"][tokens] * hidden
    for i in range(SHAPE.layers):
        block = f"model.transformer.blocks.{i}"
        head, width = z(of["head"][i], target["heads"]), z(of["intermediate"][i], target["ffn"])
        a = norm(x, weights[f"{block}.ln_1.weight"])
        q, k, v = (
            (a @ weights[f"{block}.attn.{name}.weight"].T).unflatten(-1, (4, 8)).transpose(1, 2)
            for name in ("wq", "wk", "wv")
        )
        mixed = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True) * head.view(1, 4, 1, 1)
        out = mixed.transpose(1, 2).flatten(2) @ weights[f"{block}.attn.out_proj.weight"].T
        x = x + out * layer[i] * hidden
        m = norm(x, weights[f"{block}.ln_2.weight"])
        up = m @ weights[f"{block}.mlp.up_proj.weight"].T * width
        gated = F.silu(m @ weights[f"{block}.mlp.gate_proj.weight"].T) * up
        x = x + gated @ weights[f"{block}.mlp.down_proj.weight"].T * layer[i] * hidden
    return norm(x, weights["model.transformer.ln_f.weight"]) @ weights["model.transformer.output.weight"].T


@pytest.mark.parametrize("target", [TARGET, {**TARGET, "layers": 3, "ffn": 20}], ids=["all", "some"])
def test_a_pruning_run_is_cut_as_its_masked_model_computes(target: dict[str, int], like: Path, tmp_path: Path) -> None:
    """A kind that the target leaves as it is has soft values all the same."""
    weights, logits = state(), masks()
    spelled = ",".join(f"{key}={size}" for key, size in target.items() if size != getattr(SHAPE, key))
    assert run(tmp_path, weights | logits, "--target", spelled) == 0
    architecture = read_architecture(tmp_path / "out")
    assert architecture.shape == Shape(**target, kv_heads=3, head_dim=8, vocab=40)
    small, read = Transformer(architecture), Weights.open(tmp_path / "out", architecture)
    small.load_state_dict({name: read.read(name) for name in read.names()})
    tokens = torch.arange(24).view(2, 12)
    assert torch.allclose(small(tokens), released(weights, logits, tokens, target), atol=1e-4)


def test_what_cannot_be_taken_over_is_one_line(like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(match: str, content: Any, *options: str) -> None:
        assert run(tmp_path, content, *options) == 2
        said = capsys.readouterr().err
        assert match in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()

    class Anything:
        pass

    refuse("holds more than tensors, which is not loaded", {"state": {"model": state(), "time": Path("x")}})
    refuse("is no state dict", {"loss": 3.0})
    refuse("has no matrix model.transformer.wte.weight", {"wte": torch.ones(2, 2)})
    refuse("say to what with --target", state() | masks())
    refuse("has no masks (it was cut already)", state(), "--target", "hidden=24")
    refuse("is not of the form hidden=2048", state() | masks(), "--target", "hidden:24")
    strange = {"model.l0_module.masks.qk_head_dim.z_loga": torch.ones(3)}
    refuse("prunes qk_head_dim; only hidden, layer, head", state() | strange)
    short = {"model.transformer.blocks.1.attn.wk.weight": torch.ones(8, 32)}
    refuse("blocks.1.attn.wk.weight has size [8, 32], not [32, 32]", state() | short)


def test_reading_by_slices(like: Path, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "weights.pt")
    model = Composer.open(tmp_path / "weights.pt", LIKE)
    assert torch.equal(model.read_slice("layers.0.up", 0, 3, 9), model.read("layers.0.up")[3:9])


def test_the_flags_of_the_migration_page_are_keys() -> None:
    docs = Path(__file__).parents[2] / "docs"
    rows = [line.split("|")[2] for line in (docs / "from-llm-shearing.md").read_text().splitlines() if "|" in line]
    keys, section = [], ""
    for spelled in re.findall(r"`(\.?[a-z_]+[a-z_.]*)", " ".join(rows)):
        section = section if spelled.startswith(".") else spelled.rsplit(".", 1)[0]
        keys.append(section + spelled if spelled.startswith(".") else spelled)
    assert len(keys) > 20
    known = set(re.findall(r"^\| \**`([a-z_.]+)`", (docs / "config.md").read_text(), re.MULTILINE))
    assert not [key for key in keys if key.rstrip(".") not in known]
