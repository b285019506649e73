"""Hugging Face folders: what transformers saves is read, what is written opens there, and all else is refused."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, random_model, weights_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.families import FAMILIES
from shear_tron.checkpoint.huggingface import Weights, architecture_config, read_architecture, write
from shear_tron.checkpoint.safetensors_stream import storable
from shear_tron.params import params

GROUPED, TIED, NEOX = (ARCHITECTURES[name] for name in ("llama, grouped", "llama, tied", "gpt_neox"))
Saved = tuple[Path, Architecture, dict[str, torch.Tensor]]


def random_tensors(architecture: Architecture) -> dict[str, torch.Tensor]:
    return weights_of(random_model(architecture).float())


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A written folder in several shards, its architecture and its tensors."""
    tensors = random_tensors(GROUPED)
    write(tmp_path / "model", GROUPED, tensors.items(), shard_bytes=4000)
    return tmp_path / "model", GROUPED, tensors


@pytest.mark.parametrize("name", ["llama, grouped", "gpt_neox"])
def test_reading_a_slice_is_slicing_what_was_read(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    tensors = random_tensors(architecture)
    write(tmp_path / "model", architecture, tensors.items(), shard_bytes=4000)
    weights = Weights.open(tmp_path / "model", architecture)
    for key, tensor in tensors.items():
        for axis in range(tensor.dim()):
            for start, stop in [(0, tensor.shape[axis]), (1, 5), (3, 3), (5, 13)]:
                part = weights.read_slice(key, axis, start, stop)
                assert torch.equal(part, tensor.narrow(axis, start, stop - start))
                assert part.is_contiguous()
                assert part.untyped_storage().nbytes() <= max(tensor.nbytes, part.nbytes)


@pytest.mark.parametrize(("axis", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, 0, 41), (0, -1, 2), (0, 3, 2)])
def test_a_slice_that_is_not_there(axis: int, start: int, stop: int, saved: Saved) -> None:
    with pytest.raises(ValueError, match=r"axis.* of embed \[40, \d+\]; use"):
        Weights.open(saved[0], saved[1]).read_slice("embed", axis, start, stop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_safetensors_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    architecture = TIED
    tensors = random_tensors(architecture)
    write(tmp_path / "model", architecture, tensors.items(), dtype=dtype)
    loaded = load_file(tmp_path / "model/model.safetensors")
    names = FAMILIES["llama"].names
    assert loaded.keys() == {str(names[p.row.leaf]).format(p.layer) for p in params(architecture)}
    header = (tmp_path / "model/model.safetensors").read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0  # tensors are aligned
    for parameter in params(architecture):
        assert torch.equal(
            loaded[str(names[parameter.row.leaf]).format(parameter.layer)], tensors[parameter.name].to(dtype)
        )
    assert read_architecture(tmp_path / "model") == architecture
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == dtype


def test_each_file_is_at_most_a_shard_long_and_the_index_says_where_all_is(tmp_path: Path) -> None:
    architecture = GROUPED
    write(tmp_path / "model", architecture, random_tensors(architecture).items(), shard_bytes=6200)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    files = {file: load_file(tmp_path / "model" / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    lengths = [sum(t.nbytes for t in tensors.values()) for tensors in files.values()]
    assert max(lengths) <= 6200
    assert sum(lengths) == index["metadata"]["total_size"]


@pytest.mark.parametrize(("name", "most"), [("llama, grouped", 1), ("gpt_neox", 6)])  # q, k, v and their biases
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_tensor_is_in_memory_at_a_time(dtype: torch.dtype | None, name: str, most: int, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    alive: list[weakref.ref[torch.Tensor]] = []

    def tensors() -> Any:
        for parameter in params(architecture):
            assert sum(each() is not None for each in alive) <= most
            tensor = torch.zeros(parameter.size)
            alive.append(weakref.ref(tensor))
            yield parameter.name, tensor
            del tensor

    write(tmp_path / "model", architecture, tensors(), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_no_value_that_is_not_finite_is_overlooked(value: float, dtype: torch.dtype) -> None:
    """At any place: the search is vectorised."""
    weight = torch.randn(5, 27).to(dtype)
    for place in range(weight.numel()):
        broken = weight.clone()
        broken.view(-1)[place] = value
        for given in (broken, broken.t()):
            with pytest.raises(ValueError, match="norm holds NaN or infinite values"):
                storable("norm", given, dtype)
    assert torch.equal(storable("norm", weight, dtype), weight)


def test_what_overflows_in_the_stored_type_is_refused() -> None:
    for value in (65519.0, -65519.0):  # rounds to the largest
        assert bool(storable("norm", torch.tensor([1.0, value]), torch.float16).isfinite().all())
    for value in (65520.0, -65520.0):
        with pytest.raises(ValueError, match=r"norm holds values beyond the range of torch\.float16; store"):
            storable("norm", torch.tensor([1.0, value]), torch.float16)


def test_tokenizer_and_special_tokens_travel(tmp_path: Path) -> None:
    architecture = TIED
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
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    assert (config.bos_token_id, config.eos_token_id, config.hidden_size) == (None, 2, 24)


def refuse_write(tensors: dict[str, torch.Tensor], folder: Path, match: str, **options: Any) -> None:
    """Writing fails with this message and leaves nothing behind, not even a temporary folder."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ValueError, match=match) as caught:
        write(folder, GROUPED, tensors.items(), **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.iterdir()) == before


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    good = random_tensors(GROUPED)
    folder = tmp_path / "model"
    refuse_write({k: v for k, v in good.items() if k != "layers.1.o"}, folder, r"layers\.1\..*o_proj.* was not given")
    refuse_write({**good, "layers.4.o": good["layers.1.o"]}, folder, r"layers\.4\.o is not a tensor of this model")
    refuse_write({**good, "norm": torch.ones(15)}, folder, r"norm has size \[15\]; this model's is \[24\]")
    refuse_write({**good, "norm": good["norm"].double()}, folder, r"norm is torch\.float64, tensors before it")
    refuse_write(good, folder, "int8 is not a weight's type", dtype=torch.int8)
    refuse_write({}, folder, "no tensors were given")
    refuse_write(good, folder, "has no tokenizer", tokenizer_from=tmp_path)
    with pytest.raises(ValueError, match="came twice"):
        write(folder, GROUPED, [*good.items(), ("norm", good["norm"])])
    folder.mkdir()
    (folder / "precious").write_text("x")
    refuse_write(good, folder, "exists and is not empty")
    assert (folder / "precious").read_text() == "x"
    (folder / "precious").unlink()
    write(folder, GROUPED, good.items())  # an empty folder is as good as none
    Weights.open(folder, GROUPED)


def test_parts_of_a_fused_tensor_all_come_in_their_size(tmp_path: Path) -> None:
    good = random_tensors(NEOX)
    for changed, match in [
        ({"layers.1.k": None}, r"layers\.1\.k was not given beside layers\.1\.q"),
        ({"layers.1.v_bias": None}, r"layers\.1\.v_bias was not given beside layers\.1\.q_bias"),
        ({"layers.1.v": torch.ones(31, 32)}, r"layers\.1\.v has size \[31, 32\]; this model's is \[32, 32\]"),
    ]:
        tensors = {name: tensor for name, tensor in {**good, **changed}.items() if tensor is not None}
        with pytest.raises(ValueError, match=match):
            write(tmp_path / "model", NEOX, tensors.items())
    with pytest.raises(ValueError, match="came twice"):
        write(tmp_path / "model", NEOX, [("layers.1.q", good["layers.1.q"]), *good.items()])


def test_a_shape_that_transformers_refuses_is_not_written(tmp_path: Path) -> None:
    config = architecture_config(GROUPED, torch.float32) | {"hidden_size": 20}
    with pytest.raises(Exception, match="not a multiple of the number of attention"):  # fails when they lift the rule
        LlamaConfig.from_dict(config)
    odd = replace(GROUPED, shape=replace(GROUPED.shape, hidden=20))
    with pytest.raises(ValueError, match="hidden=20 is no multiple of heads=8"):
        write(tmp_path / "model", odd, random_tensors(odd).items())


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Any:
        yield "norm", torch.ones(24)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "model", GROUPED, tensors())
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
QKV0 = "gpt_neox.layers.0.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("name", "hf", "tensor", "match"),
    [
        ("llama, grouped", Q0, None, f"lacks {Q0}"),
        ("llama, grouped", "lm_head.weight", None, r"lacks lm_head\.weight"),
        ("llama, grouped", "model.layers.4.mlp.up_proj.weight", torch.ones(20, 24), r"holds model\.layers\.4\.mlp"),
        (
            "llama, grouped",
            "model.layers.0.self_attn.q_proj.bias",
            torch.ones(48),
            "q_proj.bias, which this model lacks",
        ),
        ("llama, grouped", Q0, torch.ones(24, 48), r"size \[24, 48\], config\.json asks for \[48, 24\]"),
        ("llama, grouped", NORM, torch.ones(24, dtype=torch.int8), "is I8; use weights in F64"),
        ("llama, tied", "lm_head.weight", torch.ones(40, 24), "differs from the embedding"),
        ("llama, tied", "lm_head.weight", torch.ones(4, 24), "differs from the embedding"),
        ("gpt_neox", QKV0, None, f"lacks {QKV0}"),
        ("gpt_neox", QKV0, torch.ones(95, 32), r"size \[95, 32\], config\.json asks for \[96, 32\]"),
        ("gpt_neox, sequential, tied", "embed_out.weight", torch.ones(40, 32), "differs from the embedding"),
    ],
)
def test_opening_names_the_wrong_tensor(
    name: str, hf: str, tensor: torch.Tensor | None, match: str, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    write(tmp_path / "model", architecture, random_tensors(architecture).items())
    Weights.open(tmp_path / "model", architecture)
    change(tmp_path / "model", hf, tensor)
    with pytest.raises(ValueError, match=match) as caught:
        Weights.open(tmp_path / "model", architecture)
    assert "\n" not in str(caught.value)


def test_harmless_extras_pass(tmp_path: Path) -> None:
    architecture = TIED
    tensors = random_tensors(architecture)
    write(tmp_path / "model", architecture, tensors.items())
    change(tmp_path / "model", "lm_head.weight", tensors["embed"].clone())
    change(tmp_path / "model", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(2))
    assert "lm_head" not in Weights.open(tmp_path / "model", architecture).names()


def test_buffers_of_pythia_pass(tmp_path: Path) -> None:
    tensors = random_tensors(NEOX)
    write(tmp_path / "model", NEOX, tensors.items())
    change(tmp_path / "model", "gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool))
    change(tmp_path / "model", "gpt_neox.layers.0.attention.masked_bias", torch.tensor(-1e9))
    change(tmp_path / "model", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", torch.ones(1))
    assert set(Weights.open(tmp_path / "model", NEOX).names()) == set(tensors)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    header = data[:8] + b"xx" + data[10:]
    changed = {"cut": data[:-3], "cut_in_header": data[:50], "empty": b"", "longer": data + b"1234", "header": header}
    path.write_bytes(changed[how])


@pytest.mark.parametrize("how", ["cut", "cut_in_header", "empty", "longer", "header"])
def test_damaged_files_are_named(how: str, saved: Saved) -> None:
    folder, architecture, _ = saved
    victim = sorted(folder.glob("*.safetensors"))[1]
    damage(victim, how)
    with pytest.raises(ValueError, match=f"{victim.name} is corrupt or cut short") as caught:
        Weights.open(folder, architecture)
    assert "\n" not in str(caught.value)


def test_an_index_must_agree_with_its_files(saved: Saved) -> None:
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
    refused({**index["weight_map"], EMBED: f"../{first}"}, "no file of its folder")
    refused({EMBED: first * 20}, "no file of its folder")
    refused({**index["weight_map"], EMBED: 7}, "no weight_map")
    refused({}, "no weight_map")
    path.write_text(json.dumps(index))
    (folder / second).unlink()
    with pytest.raises(ValueError, match=f"{second} is missing"):
        Weights.open(folder, architecture)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="never loaded"):
        Weights.open(tmp_path, GROUPED)
