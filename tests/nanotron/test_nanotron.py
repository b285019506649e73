"""nanotron's own trainer goes on from what we write, and what it saves comes back: in every layout, as transformers."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpu
import pytest
import ranks
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint import huggingface
from shear_tron.checkpoint.nanotron import Checkpoint, check, write
from shear_tron.checkpoint.nanotron_config import Flavour, require
from shear_tron.checkpoint.nanotron_pieces import turn
from shear_tron.params import params
from shear_tron.shape import Shape

SHAPES = {
    "plain": Shape(hidden=32, layers=3, heads=4, kv_heads=4, head_dim=8, ffn=48, vocab=64),
    "grouped": Shape(hidden=64, layers=3, heads=8, kv_heads=2, head_dim=8, ffn=40, vocab=64),
    "tied": Shape(hidden=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=64, tied=True),
}
STEPS, SEQUENCE = 3, 24


def tensors(architecture: Architecture) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)
    return {
        p.name: 0.2 * torch.randn(p.size, generator=noise) + (1.0 if "norm" in p.name else 0.0)
        for p in params(architecture)
    }


def qwen2(shape: Shape) -> Architecture:
    return Architecture(shape, Rope(theta=1e6), context=SEQUENCE, family="qwen2", biases=frozenset("qkv"))


def batches() -> Any:
    noise = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(0, 64, (2, SEQUENCE + 1), generator=noise)


def training(folder: Path, run: Path, tp: int, pp: int) -> dict[str, Any]:
    """nanotron's YAML: three AdamW steps of two microbatches, then a checkpoint."""
    schedule = {"learning_rate": 1e-3, "min_decay_lr": 1e-3, "lr_warmup_style": "constant", "lr_decay_style": "linear"}
    adam = {"adam_eps": 1e-5, "adam_beta1": 0.9, "adam_beta2": 0.95, "torch_adam_is_fused": True}
    return {
        "general": {"project": "test", "ignore_sanity_checks": False},
        "parallelism": {"dp": 1, "tp": tp, "pp": pp, "pp_engine": "afab", "tp_mode": "REDUCE_SCATTER"},
        "model": {
            "model_config": json.loads((folder / "model_config.json").read_text()),
            "init_method": {"path": str(folder)},
            "dtype": "float32",
        },
        "tokenizer": {},
        "checkpoints": {"checkpoints_path": str(run), "checkpoint_interval": STEPS},
        "logging": {},
        "tokens": {
            "sequence_length": SEQUENCE,
            "train_steps": STEPS,
            "micro_batch_size": 2,
            "batch_accumulation_per_replica": 2,
        },
        "optimizer": {
            "zero_stage": 0,
            "weight_decay": 0.1,
            "clip_grad": 1.0,
            "accumulate_grad_in_fp32": False,
            "learning_rate_scheduler": schedule,
            **adam,
        },
    }


def train(config: str, tp: int, pp: int) -> list[float]:
    """On every rank: nanotron's DistributedTrainer on ``config``. Losses of the steps where the last stage is."""
    module = cpu.start(tp, pp)
    from nanotron.parallel.pipeline_parallel.tensor_pointer import TensorPointer
    from nanotron.parallel.pipeline_parallel.utils import get_input_output_pp_ranks

    losses = []

    class Trainer(module.DistributedTrainer):  # type: ignore[misc, name-defined]
        def training_step(self, dataloader: Any) -> Any:
            outputs, loss = super().training_step(dataloader)
            if loss is not None:
                losses.append(float(loss))
            return outputs, loss

    with cpu.CudaIsCpu():
        trainer = Trainer(config)
        first, last = get_input_output_pp_ranks(model=trainer.model)
        mine = module.dist.get_rank(trainer.parallel_context.pp_pg)

        def data() -> Any:
            for windows in batches():
                everything = torch.ones(2, SEQUENCE, dtype=torch.bool)
                content = {
                    "input_ids": (first, windows[:, :-1].contiguous()),
                    "input_mask": (first, everything),
                    "label_ids": (last, windows[:, 1:].contiguous()),
                    "label_mask": (last, everything),
                }
                yield {k: x if mine == at else TensorPointer(group_rank=at) for k, (at, x) in content.items()}

        trainer.train(data())
    return losses


def reference(folder: Path) -> tuple[list[float], LlamaForCausalLM]:
    """The same training of transformers' model."""
    model = LlamaForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    losses, data = [], batches()
    for _ in range(STEPS):
        parts = []
        for windows in (next(data), next(data)):
            logits = model(windows[:, :-1]).logits
            parts.append(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / 2)
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(part.item() for part in parts))
    return losses, model


@pytest.mark.parametrize(
    ("name", "written", "tp", "pp"),
    [("plain", 1, 1, 1), ("grouped", 1, 2, 1), ("grouped", 2, 1, 2), ("tied", 2, 2, 2)],
)
def test_nanotron_goes_on(name: str, written: int, tp: int, pp: int, tmp_path: Path) -> None:
    """Written with ``written`` pieces, trained by nanotron on tp * pp ranks, read back: as transformers and AdamW."""
    architecture = Architecture(SHAPES[name], context=SEQUENCE)
    weights = tensors(architecture)
    huggingface.write(tmp_path / "source", architecture, weights.items())
    write(tmp_path / "nanotron", architecture, weights.items(), flavour="0.4", dtype=torch.float32, tp=written)
    config = training(tmp_path / "nanotron", tmp_path / "run", tp, pp)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    losses = ranks.run(tp * pp, train, str(tmp_path / "config.yaml"), tp, pp)
    wanted, model = reference(tmp_path / "source")
    assert losses[-1] == pytest.approx(wanted, abs=1e-5)

    saved = Checkpoint.open(tmp_path / "run" / str(STEPS))
    assert saved.architecture == architecture
    huggingface.write(tmp_path / "back", saved.architecture, saved.tensors())
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    moved = 0.0
    for after, before, found in zip(
        model.parameters(), LlamaForCausalLM.from_pretrained(tmp_path / "source").parameters(), back.parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(found, after, atol=5e-6)
        moved = max(moved, float((found - before).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("flavour", ["0.4", "main"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(name: str, tp: int, flavour: Flavour, tmp_path: Path) -> None:
    rope = Rope(theta=10000.0 if flavour == "0.4" else 500000.0)
    architecture = Architecture(SHAPES[name], rope, context=SEQUENCE)
    weights = tensors(architecture)
    write(tmp_path / "out", architecture, reversed(weights.items()), flavour=flavour, dtype=torch.float32, tp=tp)
    read = Checkpoint.open(tmp_path / "out")
    assert read.architecture == architecture
    assert read.interleaved == (flavour == "0.4")
    assert read.names() == list(weights)
    for each, tensor in weights.items():
        assert torch.equal(read.read(each), tensor)
        assert torch.equal(read.read_slice(each, 0, 3, 9), tensor[3:9])
    done = check(tmp_path / "out")
    assert f"{len(list((tmp_path / 'out/model').rglob('*.safetensors')))} files read back" in done
    assert ("main branch" in done) == (flavour == "main")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_a_qwen2_with_biases_goes_to_main_and_back(name: str, tp: int, tmp_path: Path) -> None:
    """One tensor holds the three biases, cut over ranks as their weights are."""
    architecture = qwen2(SHAPES[name])
    weights = tensors(architecture)
    write(tmp_path / "out", architecture, reversed(weights.items()), dtype=torch.float32, tp=tp)
    config = json.loads((tmp_path / "out/model_config.json").read_text())
    assert config["is_qwen2_config"] is config["attention_bias"] is True
    assert "is_llama_config" not in config
    qkv = tmp_path / "out/model/model/decoder/0/pp_block/attn/qkv_proj"
    last = qkv / f"model_bias_pp-rank-0-of-1_tp-rank-{tp - 1}-of-{tp}.safetensors"
    every = [weights[f"layers.0.{part}_bias"].chunk(tp)[-1] for part in "qkv"]
    assert torch.equal(load_file(last)["data"], torch.cat(every))
    read = Checkpoint.open(tmp_path / "out")
    assert read.architecture == architecture
    assert read.names() == list(weights)
    for each, tensor in weights.items():
        assert torch.equal(read.read(each), tensor)
        assert torch.equal(read.read_slice(each, 0, 3, 9), tensor[3:9])
    assert "files read back by nanotron's own classes" in check(tmp_path / "out")
    huggingface.write(tmp_path / "back", read.architecture, read.tensors())
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)[1]["unexpected_keys"]
    for file in qkv.glob("model_bias*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"qkv_proj/model_bias\* is not one tensor in pieces"):
        Checkpoint.open(tmp_path / "out")


def test_biases_that_the_config_does_not_tell_of_are_not_lost(tmp_path: Path) -> None:
    architecture = qwen2(SHAPES["grouped"])
    write(tmp_path / "out", architecture, tensors(architecture).items())
    config = json.loads((tmp_path / "out/model_config.json").read_text())
    (tmp_path / "out/model_config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(ValueError, match=r"qkv_proj/model_bias.* is no part of the model that model_config.json"):
        Checkpoint.open(tmp_path / "out")
    llama = {key: value for key, value in config.items() if key != "is_qwen2_config"} | {"is_llama_config": True}
    (tmp_path / "out/model_config.json").write_text(json.dumps(llama))
    with pytest.raises(ValueError, match="attention_bias is nanotron's Qwen2's, its LLaMA ignores it; set it to false"):
        Checkpoint.open(tmp_path / "out")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint in two pieces, of the grouped shape."""
    architecture = Architecture(SHAPES["grouped"], context=SEQUENCE)
    write(tmp_path / "out", architecture, tensors(architecture).items(), flavour="0.4", dtype=torch.float32, tp=2)
    return tmp_path / "out"


def rewrite(file: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change a file's header."""
    with safe_open(file, framework="pt") as opened:
        header, data = opened.metadata(), opened.get_tensor("data")
    change(header)
    save_file({"data": data}, file, header)


def test_headers_that_numpy_2_made_are_read(written: Path) -> None:
    """Release 0.4 writes such headers under numpy 2, and cannot read them itself."""
    for file in written.rglob("*qkv_proj/*.safetensors"):
        rewrite(file, lambda header: header.update(unsharded_shape="(np.int64(96), 64)"))
    weights = tensors(Architecture(SHAPES["grouped"]))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in Checkpoint.open(written).tensors())


def test_pieces_that_do_not_make_one_tensor_are_refused(written: Path) -> None:
    qkv = sorted((written / "model/model/decoder/1/pp_block/attn/qkv_proj").iterdir())
    one = qkv[0].read_bytes()
    qkv[0].unlink()
    with pytest.raises(ValueError, match=r"qkv_proj/model_weight\* is not one tensor in pieces; copy all ranks' files"):
        Checkpoint.open(written)
    (qkv[0].parent / "model_weight_pp-rank-0-of-1_tp-rank-0-of-4.safetensors").write_bytes(one)
    Checkpoint.open(written)  # names do not count
    qkv[0].write_bytes(one)
    with pytest.raises(ValueError, match="those of one layout only"):
        Checkpoint.open(written)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"unsharded_shape": "(96, 32)"}, r"of size \[96, 32\], model_config.json asks for \[96, 64\]"),
        ({"version": "2.0"}, r"of format 2.0; use a checkpoint of 1.2 to 1.5"),
        ({"local_global_slices_pairs": "None,None,2|None,None,None#0,48,None|None,None,None"}, "cut in a way that no"),
    ],
)
def test_headers_that_are_no_llama_are_refused(written: Path, header: dict[str, str], match: str) -> None:
    rewrite(next(written.rglob("*/qkv_proj/*.safetensors")), lambda found: found.update(header))
    with pytest.raises(ValueError, match=match):
        Checkpoint.open(written)


@pytest.mark.parametrize("key", ["moe_config", "no_rope_layer", "sliding_window_size", "rope_scaling"])
def test_models_with_other_parts_are_refused(written: Path, key: str) -> None:
    config = json.loads((written / "model_config.json").read_text())
    (written / "model_config.json").write_text(json.dumps({**config, key: 2}))
    with pytest.raises(ValueError, match=f"{key}=2 is not supported; use a model without"):
        Checkpoint.open(written)
    (written / "model_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))
    with pytest.raises(ValueError, match="vocab_size is missing; it has no default; copy the file"):
        Checkpoint.open(written)


def test_nanotron_says_what_it_does_not_read(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(next(written.rglob("*/qkv_proj/*.safetensors")), lambda header: header.update(version="new"))
    with pytest.raises(ValueError, match="nanotron does not read"):
        check(written)
    monkeypatch.setitem(sys.modules, "nanotron", None)
    monkeypatch.setitem(sys.modules, "nanotron.config", None)
    assert "not read back: nanotron cannot be imported" in check(written)


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    architecture = Architecture(SHAPES["grouped"])
    weights = tensors(architecture)
    extra, short = {**weights, "more": torch.ones(1)}, {**weights, "norm": torch.ones(3)}
    missing = {name: tensor for name, tensor in weights.items() if name != "layers.1.k"}
    for wrong, match in [
        (missing, "layers.1.k was not given"),
        (extra, "more is not a tensor of this model"),
        ({**weights, "norm": torch.full((64,), torch.nan)}, "norm holds NaN or infinite values"),
        (short, r"norm has size \[3\]; this model's is \[64\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            write(tmp_path / "out", architecture, wrong.items())
        assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        write(tmp_path / "out", architecture, weights.items())


def test_turning_is_its_own_way_back() -> None:
    x = torch.arange(48.0).view(16, 3)
    assert turn(x, 8)[:4, 0].tolist() == [0.0, 12.0, 3.0, 15.0]
    assert torch.equal(turn(turn(x, 8), 8, back=True), x)


def test_what_nanotron_lacks_is_refused() -> None:
    architecture = Architecture(SHAPES["grouped"])
    with pytest.raises(ValueError, match="hidden=64 is not heads=4 times head_dim=8"):
        require(replace(architecture, shape=replace(architecture.shape, heads=4)), "main")
    with pytest.raises(ValueError, match="ignores rope_scaling"):
        require(replace(architecture, rope=Rope(factor=8.0)), "main")
    with pytest.raises(ValueError, match="write for main"):
        require(replace(architecture, rope=Rope(theta=500000.0)), "0.4")
    with pytest.raises(ValueError, match="kv_heads=2 does not split over tp=4"):
        require(architecture, "main", tp=4)
    with pytest.raises(ValueError, match=r"biases of k, q, v: nanotron 0\.4 has none; write for main"):
        require(replace(qwen2(SHAPES["grouped"]), rope=Rope()), "0.4")
    with pytest.raises(ValueError, match="biases of k, o, q, v: nanotron has those of q, k and v, all or none"):
        require(replace(architecture, biases=frozenset("qkvo")), "main")
    with pytest.raises(ValueError, match="window=8: nanotron has no such model"):
        require(replace(qwen2(SHAPES["grouped"]), window=8), "main")
