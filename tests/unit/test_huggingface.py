"""Hugging Face folders: what transformers saves is read, what is written opens there, and all else is refused."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint.huggingface import Weights, architecture_config, read_architecture, write
from shear_tron.params import params
from shear_tron.shape import Shape

LLAMA3 = Rope(theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
SHAPES = {
    "plain": Shape(hidden=16, layers=2, heads=4, kv_heads=4, head_dim=4, ffn=24, vocab=32),
    "grouped": Shape(hidden=18, layers=2, heads=6, kv_heads=2, head_dim=8, ffn=24, vocab=32),
    "tied": Shape(hidden=18, layers=3, heads=6, kv_heads=3, head_dim=4, ffn=20, vocab=40, tied=True),
}


def architecture_of(name: str, rope: Rope | None = None) -> Architecture:
    return Architecture(SHAPES[name], rope or Rope(), norm_eps=1e-5, context=128)


def random_tensors(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {p.name: torch.randn(p.size, generator=noise) * 0.3 for p in params(architecture.shape)}


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model, info = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(0, 32, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Architecture, dict[str, torch.Tensor]]:
    """A written folder in several shards, its architecture and its tensors."""
    architecture = architecture_of("grouped")
    tensors = random_tensors(architecture)
    write(tmp_path / "model", architecture, tensors.items(), shard_bytes=4000)
    return tmp_path / "model", architecture, tensors


@pytest.mark.parametrize("shard_bytes", [5e9, 3000])
@pytest.mark.parametrize("rope", [Rope(theta=100000.0), LLAMA3], ids=["default", "llama3"])
@pytest.mark.parametrize("name", SHAPES)
def test_round_trip_through_transformers(name: str, rope: Rope, shard_bytes: float, tmp_path: Path) -> None:
    """transformers saves -> Weights -> write -> transformers: same logits, bit for bit, and the same tensors."""
    architecture = architecture_of(name, rope)
    torch.manual_seed(0)
    config = LlamaConfig.from_dict(architecture_config(architecture, torch.float32))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source", max_shard_size="5KB")
    assert (tmp_path / "source/model.safetensors.index.json").exists()
    assert read_architecture(tmp_path / "source") == architecture  # in transformers 5's spelling

    weights = Weights.open(tmp_path / "source", architecture)
    assert weights.names() == [p.name for p in params(architecture.shape)]
    backwards = ((each, weights.read(each)) for each in reversed(weights.names()))
    write(tmp_path / "copy", architecture, backwards, shard_bytes=shard_bytes)

    assert (tmp_path / "copy/model.safetensors").exists() == (shard_bytes == 5e9)
    assert read_architecture(tmp_path / "copy") == architecture  # in transformers 4's spelling
    assert torch.equal(logits(tmp_path / "source"), logits(tmp_path / "copy"))
    again = Weights.open(tmp_path / "copy", architecture)
    assert all(torch.equal(again.read(each), weights.read(each)) for each in weights.names())


def test_reading_a_slice_is_slicing_what_was_read(saved: tuple[Path, Architecture, dict[str, torch.Tensor]]) -> None:
    folder, architecture, tensors = saved
    weights = Weights.open(folder, architecture)
    for name, tensor in tensors.items():
        for axis in range(tensor.dim()):
            for start, stop in [(0, tensor.shape[axis]), (1, 5), (3, 3)]:
                part = weights.read_slice(name, axis, start, stop)
                assert torch.equal(part, tensor.narrow(axis, start, stop - start))
                assert part.is_contiguous()


@pytest.mark.parametrize(("axis", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, 0, 33), (0, -1, 2), (0, 3, 2)])
def test_a_slice_that_is_not_there(
    axis: int, start: int, stop: int, saved: tuple[Path, Architecture, dict[str, torch.Tensor]]
) -> None:
    with pytest.raises(ValueError, match=r"axis.* of embed \[32, 18\]; use"):
        Weights.open(saved[0], saved[1]).read_slice("embed", axis, start, stop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_safetensors_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    architecture = architecture_of("tied")
    tensors = random_tensors(architecture)
    write(tmp_path / "model", architecture, tensors.items(), dtype=dtype)
    loaded = load_file(tmp_path / "model/model.safetensors")
    assert loaded.keys() == {p.hf for p in params(architecture.shape)}
    header = (tmp_path / "model/model.safetensors").read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0  # tensors are aligned
    for parameter in params(architecture.shape):
        assert torch.equal(loaded[parameter.hf], tensors[parameter.name].to(dtype))
    assert read_architecture(tmp_path / "model") == architecture
    assert LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == dtype


def test_each_file_is_at_most_a_shard_long_and_the_index_says_where_all_is(tmp_path: Path) -> None:
    architecture = architecture_of("grouped")
    write(tmp_path / "model", architecture, random_tensors(architecture).items(), shard_bytes=6200)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    files = {file: load_file(tmp_path / "model" / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    lengths = [sum(t.nbytes for t in tensors.values()) for tensors in files.values()]
    assert max(lengths) <= 6200
    assert sum(lengths) == index["metadata"]["total_size"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_tensor_is_in_memory_at_a_time(dtype: torch.dtype | None, tmp_path: Path) -> None:
    architecture = architecture_of("grouped")
    alive: list[weakref.ref[torch.Tensor]] = []

    def tensors() -> Any:
        for parameter in params(architecture.shape):
            assert sum(each() is not None for each in alive) <= 1
            tensor = torch.zeros(parameter.size)
            alive.append(weakref.ref(tensor))
            yield parameter.name, tensor
            del tensor

    write(tmp_path / "model", architecture, tensors(), dtype=dtype)


def test_tokenizer_and_special_tokens_travel(tmp_path: Path) -> None:
    architecture = architecture_of("tied")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tmp_path / "source"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    (source / "config.json").write_text(json.dumps({"eos_token_id": 2, "hidden_size": 999}))
    write(tmp_path / "model", architecture, random_tensors(architecture).items(), tokenizer_from=source)
    opened = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert opened("a b <end>").input_ids == [0, 1, 2]
    assert opened.eos_token == "<end>"
    config = LlamaForCausalLM.from_pretrained(tmp_path / "model").config
    assert (config.bos_token_id, config.eos_token_id, config.hidden_size) == (None, 2, 18)


def refuse_write(tensors: dict[str, torch.Tensor], folder: Path, match: str, **options: Any) -> None:
    """Writing fails with this message and leaves nothing behind, not even a temporary folder."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ValueError, match=match) as caught:
        write(folder, architecture_of("grouped"), tensors.items(), **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.iterdir()) == before


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    good = random_tensors(architecture_of("grouped"))
    folder = tmp_path / "model"
    refuse_write({k: v for k, v in good.items() if k != "layers.1.o"}, folder, r"layers\.1\..*o_proj.* was not given")
    refuse_write({**good, "layers.2.o": good["layers.1.o"]}, folder, r"layers\.2\.o is not a tensor of this model")
    refuse_write({**good, "norm": torch.ones(15)}, folder, r"norm\.weight has size \[15\]; this model's is \[18\]")
    refuse_write({**good, "norm": good["norm"].double()}, folder, r"norm is torch\.float64, tensors before it")
    refuse_write(good, folder, "int8 is not a weight's type", dtype=torch.int8)
    refuse_write({}, folder, "no tensors were given")
    refuse_write(good, folder, "has no tokenizer", tokenizer_from=tmp_path)
    with pytest.raises(ValueError, match="came twice"):
        write(folder, architecture_of("grouped"), [*good.items(), ("norm", good["norm"])])
    folder.mkdir()
    (folder / "precious").write_text("x")
    refuse_write(good, folder, "exists and is not empty")
    assert (folder / "precious").read_text() == "x"
    (folder / "precious").unlink()
    write(folder, architecture_of("grouped"), good.items())  # an empty folder is as good as none
    Weights.open(folder, architecture_of("grouped"))


def test_a_shape_that_transformers_refuses_is_not_written(tmp_path: Path) -> None:
    shape = Shape(hidden=16, layers=1, heads=6, kv_heads=2, head_dim=8, ffn=24, vocab=32)
    config = architecture_config(architecture_of("grouped"), torch.float32) | {"hidden_size": 16}
    with pytest.raises(Exception, match="not a multiple of the number of attention"):  # fails when they lift the rule
        LlamaConfig.from_dict(config)
    with pytest.raises(ValueError, match="hidden=16 is no multiple of heads=6"):
        write(tmp_path / "model", Architecture(shape), random_tensors(Architecture(shape)).items())


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Any:
        yield "norm", torch.ones(18)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "model", architecture_of("grouped"), tensors())
    assert not any(tmp_path.iterdir())


# --- opening is strict: each damage is found from the headers, and named


def change(folder: Path, hf: str, tensor: torch.Tensor | None) -> None:
    """Replace, add or (None) remove a tensor of a folder, keeping its index consistent."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(hf, None)
    if tensor is not None:
        tensors[hf] = tensor
    save_file(tensors, path, {"format": "pt"})


EMBED, NORM, Q0 = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("shape", "hf", "tensor", "match"),
    [
        ("grouped", Q0, None, f"lacks {Q0}"),
        ("grouped", "lm_head.weight", None, r"lacks lm_head\.weight"),
        ("grouped", "model.layers.2.mlp.up_proj.weight", torch.ones(24, 18), r"holds model\.layers\.2\.mlp"),
        ("grouped", "model.layers.0.self_attn.q_proj.bias", torch.ones(48), "q_proj.bias, which this model lacks"),
        ("grouped", Q0, torch.ones(18, 48), r"size \[18, 48\], config\.json asks for \[48, 18\]"),
        ("grouped", NORM, torch.ones(18, dtype=torch.int8), "is I8; use weights in F64"),
        ("tied", "lm_head.weight", torch.ones(40, 18), "differs from the embedding"),
        ("tied", "lm_head.weight", torch.ones(4, 18), "differs from the embedding"),
    ],
)
def test_opening_names_the_wrong_tensor(
    shape: str, hf: str, tensor: torch.Tensor | None, match: str, tmp_path: Path
) -> None:
    architecture = architecture_of(shape)
    write(tmp_path / "model", architecture, random_tensors(architecture).items())
    Weights.open(tmp_path / "model", architecture)
    change(tmp_path / "model", hf, tensor)
    with pytest.raises(ValueError, match=match) as caught:
        Weights.open(tmp_path / "model", architecture)
    assert "\n" not in str(caught.value)


def test_harmless_extras_pass(tmp_path: Path) -> None:
    architecture = architecture_of("tied")
    tensors = random_tensors(architecture)
    write(tmp_path / "model", architecture, tensors.items())
    change(tmp_path / "model", "lm_head.weight", tensors["embed"].clone())
    change(tmp_path / "model", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2))
    assert "lm_head" not in Weights.open(tmp_path / "model", architecture).names()


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    header = data[:8] + b"xx" + data[10:]
    changed = {"cut": data[:-3], "cut_in_header": data[:50], "empty": b"", "longer": data + b"1234", "header": header}
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["cut", "cut_in_header", "empty", "longer", "header"])
def test_damaged_files_are_named(how: str, saved: tuple[Path, Architecture, dict[str, torch.Tensor]]) -> None:
    folder, architecture, _ = saved
    victim = sorted(folder.glob("*.safetensors"))[1]
    damage(victim, how)
    with pytest.raises(ValueError, match=f"{victim.name} is corrupt or cut short") as caught:
        Weights.open(folder, architecture)
    assert "\n" not in str(caught.value)


def test_an_index_must_agree_with_its_files(saved: tuple[Path, Architecture, dict[str, torch.Tensor]]) -> None:
    folder, architecture, _ = saved
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]

    def refused(weight_map: Any, match: str) -> None:
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=match):
            Weights.open(folder, architecture)

    assert index["weight_map"][EMBED] == first
    refused({**index["weight_map"], EMBED: second}, f"{second} lacks {EMBED}|{first} holds {EMBED}")
    refused({**index["weight_map"], "ghost": second}, f"{second} lacks ghost")
    refused({k: v for k, v in index["weight_map"].items() if k != NORM}, f"holds {NORM}, which .* does not place there")
    refused({**index["weight_map"], EMBED: f"../{first}"}, "outside its folder")
    refused({}, "no weight_map")
    path.write_text(json.dumps(index))
    (folder / second).unlink()
    with pytest.raises(ValueError, match=f"{second} is missing"):
        Weights.open(folder, architecture)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="never loaded"):
        Weights.open(tmp_path, architecture_of("plain"))
