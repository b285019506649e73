"""Everything that shear-tron reads: of each kind small files that are whole, and what reads all of them.

Tests damage every file, and put others in its place. What a command only writes (``eval --json``) is not here, nor what
is asked of the machine (``/proc``), nor ``config.until-*.yaml``, which is read as ``config.yaml`` is.
"""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece
import torch
import yaml
from safetensors.numpy import save as save_arrays
from safetensors.torch import save_file
from shear_kernels.sampling import WHOLE as WHOLE_PARTS
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import huggingface, nanotron, sharded
from shear_tron.checkpoint.composer import _NAMES, Composer
from shear_tron.checkpoint.gguf_vocab import add_vocabulary
from shear_tron.checkpoint.model_folder import open_model
from shear_tron.checkpoint.remote import Remote, fetch_latest
from shear_tron.config import load
from shear_tron.data.duplicates import drop_duplicates
from shear_tron.data.manifest import Domain, Manifest, Shard
from shear_tron.data.mds import import_data
from shear_tron.data.prepare import PrepareConfig
from shear_tron.data.sampler import Windows
from shear_tron.data.shards import Read, Receipt, Sign, kept
from shear_tron.data.stats import stats
from shear_tron.data.tasks import DomainSource
from shear_tron.data.tasks import plan as tasks_of
from shear_tron.data.tokenizer import Tokenizer
from shear_tron.files import sha256
from shear_tron.forecast.devices import TABLE, device
from shear_tron.params import count, params
from shear_tron.shape import Shape
from shear_tron.train import saved
from shear_tron.train.cache import FILE, FORMAT, Cache, Facts, _opened
from shear_tron.train.card import card
from shear_tron.train.claim import claim_run_folder
from shear_tron.train.config import RunConfig
from shear_tron.train.plan import _references
from shear_tron.train.run_folder import RunFolder
from shear_tron.use.network import load_transformers, load_words
from shear_tron.use.reference import ReferenceConfig
from shear_tron.use.reference import _read as losses_by_size

Reader = Callable[[], object]
SHAPE = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16, vocab=300)
MULTI = replace(SHAPE, kv_heads=2)
CONFIG: dict[str, Any] = {
    "run": "runs/x",
    "model": "m",
    "data": {"folder": "d", "sequence": 16, "weights": {"a": 1.0, "b": 2.0}, "reference_losses": {"a": 1.0}},
    "train": {"steps": 14, "batch": 8, "micro_batch": 1},
    "optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.95]},
    "prune": {"target": {"hidden": 8, "ffn": 8}, "warmup_steps": 6},
}
STATE = {
    "updates_before": 0,
    "health": {"skipped": 0, "skipped_in_a_row": 0},
    "losses": [3.0],
    "sampler": {"seed": 0, "sequence": 16, "number": 24, "drawn": {"a": 24}, "windows": {"a": 3}},
    "mixture": {"weights": {"a": 1.0}, "start": {"a": 1.0}, "memory": {}},
    "references": {"a": 1.0},
}
TEXTS = ["one two three", "four five six", "seven eight nine ten"]
# What a Parquet, Arrow, .npy or compressed file has at its end or in between is as telling as its head.
WHOLE = {".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".npy", ".mds", ".pt", ".index", ".model"}


def weights(architecture: Architecture) -> list[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(each.name, torch.randn(each.size, generator=draw)) for each in params(architecture)]


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))


def write_yaml(file: Path, value: object) -> None:
    file.write_text(yaml.safe_dump(value))


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE of 256 + 2 merges + 2 special tokens, and SentencePiece's names of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "on", "one"])}
    library = Library(models.BPE(vocab=vocabulary, merges=[("o", "n"), ("on", "e")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<begin>", "<end>"])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<begin>", "eos_token": "<end>", "add_prefix_space": False}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def write_sentencepiece(folder: Path) -> None:
    out = io.BytesIO()
    settings = {"vocab_size": 280, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 9), model_writer=out, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(out.getvalue())


def write_data(folder: Path) -> Manifest:
    """A domain of two shards."""
    write_tokenizer(folder.parent / "words")
    shards = []
    for name in ("train.ds", "held_out.ds"):
        ids, ends = np.arange(64, dtype="<u2"), np.array([20, 64], dtype="<u8")
        ids.tofile(folder / name)
        ends.tofile(folder / f"{name}.index")
        shards.append(Shard(name, 64, 2, sha256(folder / name), sha256(folder / f"{name}.index")))
    words = Tokenizer(str(folder.parent / "words"))
    facts = words.path, words.sha256, words.vocab, 2, words.id("<begin>"), words.id("<end>"), 0.1
    manifest = Manifest(str(folder), *facts, {"a": Domain((shards[0],), (shards[1],), "x", "y")})
    manifest.write()
    return manifest


def write_mds(folder: Path, shards: list[list[bytes]], **changes: Any) -> None:
    """What MDSWriter(columns={"tokens": "bytes", "set": "str"}, compression=None) writes (version 0.13)."""
    folder.mkdir(parents=True)
    described = []
    for number, samples in enumerate(shards):
        columns = {"column_names": ["set", "tokens"], "column_encodings": ["str", "bytes"], "column_sizes": [None] * 2}
        config = {"version": 2, "format": "mds", "compression": None, "hashes": [], "size_limit": 1 << 26, **columns}
        text = json.dumps(config, sort_keys=True).encode()
        name = folder.name.encode()
        bodies = [np.array([len(name), len(each)], "<u4").tobytes() + name + each for each in samples]
        places = np.cumsum([4 + 4 * (len(bodies) + 1) + len(text), *map(len, bodies)]).astype("<u4")
        content = np.uint32(len(bodies)).tobytes() + places.tobytes() + text + b"".join(bodies)
        file = {"basename": f"shard.{number:05d}.mds", "bytes": len(content), "hashes": {}}
        (folder / str(file["basename"])).write_bytes(content)
        described.append({**config, "samples": len(bodies), "raw_data": file, "zip_data": None, **changes})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": described}))


def write_checkpoint(run: Path, step: int) -> None:
    checkpoint = sharded.path(run, step)
    checkpoint.mkdir(parents=True)
    name = "shard-00000-model-00001-of-00001.safetensors"
    about = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [0]}}), "DCP_VERSION": "1.0", "format": "pt"}
    save_file({"a": torch.ones(3)}, checkpoint / name, metadata=about)
    files = {name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}}
    (checkpoint / sharded.PROGRESS).write_text(sharded.sealed({"step": step, "files": files, "state": STATE}))


def config(folder: Path) -> Reader:
    write_yaml(folder / "x.yaml", CONFIG)
    return lambda: load(RunConfig, folder / "x.yaml")


def override(folder: Path) -> Reader:
    write_yaml(folder.parent / "x.yaml", CONFIG)
    (folder / "override").write_text("data.weights={a: 1, b: 2}")

    def read() -> object:
        given = folder / "override"
        if not given.is_file():
            raise ValueError("override: a command line is text")
        return load(RunConfig, folder.parent / "x.yaml", [given.read_text(errors="replace")])

    return read


def settings(folder: Path) -> Reader:
    """Configs of other verbs, and files of losses."""
    write_yaml(folder / "prepare.yaml", {"output": "o", "tokenizer": "t", "domains": {"a": {"path": "p", "limit": 3}}})
    write_yaml(folder / "reference.yaml", {"models": ["m"], "folder": "d", "sequence": 16})
    write_yaml(folder / "losses.yaml", {"a": 1.5, "b": 2.0})
    write_yaml(folder / "sizes.yaml", {1e6: {"a": 3.0}, 1e7: {"a": 2.0}, 1e8: {"a": 1.5}})
    return lambda: (
        load(PrepareConfig, folder / "prepare.yaml"),
        load(ReferenceConfig, folder / "reference.yaml"),
        _references(str(folder / "losses.yaml")),
        losses_by_size(str(folder / "sizes.yaml")),
    )


def devices(folder: Path) -> Reader:
    (folder / "devices.yaml").write_text(TABLE.read_text())
    name = next(iter(yaml.safe_load(TABLE.read_text())))
    return lambda: device(name, str(folder / "devices.yaml"))


def text(folder: Path) -> Reader:
    """Corpora, of each format and compression."""
    lines = "".join(json.dumps({"text": each, "meta": {"source": "x"}}) + "\n" for each in TEXTS).encode()
    table = pyarrow.table({"text": TEXTS, "meta": [{"source": "x"}] * 3})
    for name, content in {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.bz2": bz2.compress(lines),
        "d.jsonl.xz": lzma.compress(lines),
        "e.jsonl.zst": bytes(pyarrow.compress(lines, "zstd", asbytes=True)),
        "f.txt": "\n".join(TEXTS).encode(),
    }.items():
        (folder / name).write_bytes(content)
    pyarrow.parquet.write_table(table, folder / "g.parquet")
    (folder / "saved").mkdir()
    with pyarrow.ipc.new_stream(str(folder / "saved" / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    write_json(folder / "saved" / "state.json", {"_data_files": [{"filename": "data.arrow"}]})
    (folder / "splits").mkdir()
    write_json(folder / "splits" / "dataset_dict.json", {"splits": ["train"]})

    def read() -> object:
        places = sorted(path for path in folder.iterdir() if path.name != "splits")
        names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.bz2", "d.jsonl.xz", "e.jsonl.zst", "f.txt", "g.parquet", "saved"]
        if [path.name for path in places] != names:
            raise ValueError(f"{folder} lacks a file")
        found = []
        for path in places:
            source = DomainSource(path=str(path), where={} if path.suffix == ".txt" else {"meta.source": "x"})
            found += list(Read(tasks_of("a", source, 0.1, 64, {})).run(rank=0))
        try:
            tasks_of("a", DomainSource(path=str(folder / "splits")), 0.1, 64, {})
        except ValueError as error:
            if "holds the splits train; give one" not in str(error):  # the answer to a whole file
                raise
        return found

    return read


def prepared(folder: Path) -> Reader:
    write_data(folder)

    def read() -> object:
        stats(str(folder))
        manifest = Manifest.read(str(folder), tokenizer=str(folder.parent / "words"), vocab=260)
        for shard in manifest.shards():
            windows = Windows(manifest, (shard,), 16)
            rows = np.arange(windows.count)
            windows.read_into(np.empty((windows.count, 17), "<u2"), rows, rows)
        manifest.verify()
        return manifest

    return read


def half_prepared(folder: Path) -> Reader:
    """What `prepare` leaves for itself: receipts, shards, fingerprints of documents."""
    work = folder.parent / "text.jsonl"
    work.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    (task,) = tasks_of("a", DomainSource(path=str(work)), 0.1, 1 << 20, {})
    manifest = write_data(folder)
    (shard,) = manifest.domains["a"].train
    Receipt.path(str(folder), task).parent.mkdir()
    write_json(Receipt.path(str(folder), task), asdict(Receipt(shard, None, 0, 0, 0)))
    Sign([task], str(folder)).run(Read([task]).run(rank=0))
    for unread in ("domains.json", "held_out.ds", "held_out.ds.index"):
        (folder / unread).unlink()
    (keeping,) = drop_duplicates([task], str(folder), across=True)

    def read() -> object:
        Sign.read(str(folder), task)
        if Receipt.read(str(folder), task, 2) is None:
            raise ValueError(f"{folder}: done again")
        return kept(keeping)

    return read


def tokenizer(folder: Path) -> Reader:
    write_tokenizer(folder)
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<end>"}})
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<begin>"}}')  # eos is in the other file
    return lambda: _used(Tokenizer(str(folder)))


def sentencepiece_model(folder: Path) -> Reader:
    write_sentencepiece(folder)
    return lambda: _used(Tokenizer(str(folder)))


def _used(words: Tokenizer) -> object:
    return words.encode(["one two", ""]), words.byte_lengths(), words.bos, words.eos


def vocabulary(folder: Path) -> Reader:
    """Of tokenizers, what goes into a GGUF file."""
    import gguf

    write_tokenizer(folder / "json")
    write_sentencepiece(folder / "pieces")
    write_json(folder / "pieces" / "added_tokens.json", {"<more>": 280})
    added = {"281": {"content": "<|user|>", "special": True}}
    write_json(folder / "pieces" / "tokenizer_config.json", {"added_tokens_decoder": added, "bos_token": "<s>"})
    write_json(folder / "json" / "config.json", {"bos_token_id": 258})
    write_json(folder / "json" / "generation_config.json", {"eos_token_id": 259})

    def read() -> object:
        for each in ("json", "pieces"):
            add_vocabulary(gguf.GGUFWriter(folder.parent / "x.gguf", "llama"), folder / each, 300)
        return None

    return read


def _all(model: Any) -> object:
    return [model.read(name) for name in model.names()]


def model(folder: Path) -> Reader:
    """Hugging Face folders: of one file, and of several."""
    architecture = Architecture(SHAPE)
    huggingface.write(folder / "one", architecture, weights(architecture))
    huggingface.write(folder / "several", architecture, weights(architecture), shard_bytes=9000)
    assert (folder / "several" / "model.safetensors.index.json").exists()
    return lambda: [_all(open_model(folder / each)) for each in ("one", "several")]


def nanotron_checkpoint(folder: Path) -> Reader:
    architecture = Architecture(MULTI)
    nanotron.write(folder / "n", architecture, weights(architecture), tp=2)
    (folder / "n" / nanotron.META).unlink()  # written for nanotron, not read
    return lambda: _all(nanotron.Checkpoint.open(folder / "n"))


def released(folder: Path) -> Reader:
    """A state dict of the paper's released code."""
    like = Architecture(MULTI)
    state = {_NAMES[each.row.leaf].format(each.layer): torch.ones(each.size) for each in params(like)}
    torch.save({"state": {"model": state}}, folder / "latest.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    return lambda: [_all(Composer.open(folder / each, like)) for each in ("latest.pt", "old.pt")]


def released_data(folder: Path) -> Reader:
    write_tokenizer(folder.parent / "words")
    ids = np.arange(40, dtype="<u2").tobytes()
    for split in ("train", "held_out"):
        write_mds(folder / split / "a", [[ids, ids]])

    def read() -> object:
        output = folder.parent / "out"
        for left in output.rglob("*") if output.exists() else ():
            if left.is_file():
                left.unlink()
        return import_data(*(str(folder / each) for each in ("train", "held_out")), str(output), f"{folder}/../words")

    return read


def checkpoint(folder: Path) -> Reader:
    write_checkpoint(folder, 3)

    def read() -> object:
        found = sharded.latest(folder)
        if found is None:
            raise ValueError(f"{folder} has no checkpoint with a {sharded.PROGRESS}")
        saved.progress(found)
        return sharded.Reader(found).read("a")

    return read


def copy(folder: Path) -> Reader:
    """A run elsewhere, which is fetched."""
    write_checkpoint(folder, 3)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')

    def read() -> object:
        with TemporaryDirectory(dir=folder.parent) as run:
            if fetch_latest(Remote(f"file://{folder}"), Path(run)) is None:
                raise ValueError(f"{folder}: {sharded.PROGRESS} is not there")
        return None

    return read


def _line(step: int) -> dict[str, Any]:
    sparsities = {f"{of}_{kind}sparsity": 0.5 for of in ("expected", "target") for kind in ("", "hidden_", "ffn_")}
    return {
        "step": step, "tokens": 128 * step, "loss": 3.5, "domain_loss": {"a": 3.5}, "weights": {"a": 0.25, "b": 0.75},
        "gradient_norm": 1.0, "learning_rate": 1e-3, "seconds": 0.5, "data_seconds": 0.1, "tokens_per_second": 256.0,
        "tflops_per_rank": 0.1, "mfu": None, "peak_memory": 10**8, "time": 1.7e9, "flops": 1e9,
        "multipliers": {"hidden": [0.1, 0.2]}, "seconds_to_dense": 0.9, "flops_to_dense": 0.8, **sparsities,
        **({"held_out": {"a": 3.0, "b": 4.0}} if step % 2 else {}),
    }  # fmt: skip


def run(folder: Path) -> Reader:
    """A run's folder with its logs, as `report`, `export` and the next start of the run read them."""
    from shear_tron.report import gates, page, story
    from shear_tron.train.metrics import _readable

    source = Architecture(SHAPE)
    huggingface.write(folder / "model", source, weights(source))
    (folder / "model" / "README.md").write_text("## Lineage\n\n1. made\n\n## Data\n")
    write_data_in(folder.parent / "data")
    place = folder / "run"
    write_checkpoint(place, 3)
    given = {**CONFIG, "run": str(place), "model": str(folder / "model")}
    given["data"] = {**CONFIG["data"], "folder": str(folder.parent / "data"), "reference_losses": "source"}
    write_yaml(place / "config.yaml", RunConfig.model_validate(given).model_dump(mode="json"))
    layout = dict.fromkeys(("pp", "replicate", "shard", "tp"), 1)
    sizes = {"shape": SHAPE.asdict(), "parameters": count(source), "target": SHAPE.asdict(), "target_parameters": 9}
    machine = {"device": "cpu", "compute": "float32", "ranks": 1, "layout": layout, "commit": None}
    header = {"from_step": 0, "time": 1.7e9, "steps": 14, "versions": {"shear-tron": "0", "torch": "2"}}
    start = {"step": 0, "tokens": 0, "weights": {"a": 0.25, "b": 0.75}, "held_out": {"a": 3.0, "b": 4.0}}
    lines = [{"run": header | sizes | machine}, {"start": start}, *(_line(step) for step in (1, 2, 3))]
    snapshot = {"hidden": [0.5, 0.5], "ffn": [[0.5, 1.0]], "kv_heads": [[1.0]], "heads_per_group": [[1.0, 1.0]]}
    logs = {"metrics.jsonl": lines, "gates.jsonl": [{"step": step, **snapshot} for step in (1, 2, 3)]}
    logs["samples.jsonl"] = [{"prompt": "a", "text": "b"}]
    for name, content in logs.items():
        (place / name).write_text("".join(json.dumps(each) + "\n" for each in content))
    write_json(place / "reference_losses.json", {"a": 1.0, "b": 2.0})

    def read() -> object:
        for name in ("metrics.jsonl", "gates.jsonl"):
            if (place / name).exists():
                _readable(place / name)  # what a run that goes on keeps: whatever can be read
        claim_run_folder(RunConfig.model_validate(given))
        told = story.read([place], [])
        page._tiles(told), page._lineage(told), page._losses(told), gates.frames(told.stages[0])
        for stage in told.stages:
            page._facts(stage)
        opened = RunFolder.open(place)
        return card(opened, "x", source, opened.source, "shear-tron export")

    return read


def write_data_in(folder: Path) -> None:
    folder.mkdir()
    write_data(folder)


def cache(folder: Path) -> Reader:
    """Samples of a teacher."""
    write_data_in(folder.parent / "data")
    manifest = Manifest.read(str(folder.parent / "data"))
    about = {"teacher": "t", "precision": "float32", "vocab": 300, "sequence": 4, "samples": 2, "temperature": 1.0}
    facts = Facts.of(manifest, ["a"], document_masking=False, **about)
    write_json(folder / FILE, {"format": FORMAT, **asdict(facts)})
    (folder / "a").mkdir()
    parts = np.stack([np.full((3, 4), WHOLE_PARTS - 1), np.ones((3, 4))], -1).astype(np.uint16)
    arrays = {"window": np.arange(3), "ids": np.ones_like(parts), "parts": parts}
    content = save_arrays(arrays | {"information": np.zeros((3, 4), np.float32)})
    (folder / "a" / "x.safetensors").write_bytes(content)
    named = sha256(folder / "a" / "x.safetensors")
    (folder / "a" / "x.safetensors").rename(folder / "a" / f"{named}.safetensors")

    def read() -> object:
        _opened.cache_clear()
        found = Cache(folder)
        names = list(found.facts.domains)
        if "a" not in names or len(found.windows("a")) < 3:
            raise ValueError(f"{folder / FILE}, {named}: windows are not there")
        for window in range(3):
            found.read("a", window)
        found.verify()
        return found

    return read


def network(folder: Path) -> Reader:
    """A model that transformers computes, with its tokenizer."""
    architecture = Architecture(SHAPE)
    write_tokenizer(folder.parent / "words")
    huggingface.write(folder / "hf", architecture, weights(architecture), tokenizer_from=folder.parent / "words")
    return lambda: (load_transformers(str(folder / "hf"), torch.float32), load_words(str(folder / "hf"))("one"))


# Kind -> (what makes and reads it, its share of all cases in percent). Dear ones get few.
INPUTS: dict[str, tuple[Callable[[Path], Reader], float]] = {
    "config": (config, 12),
    "override": (override, 6),
    "settings": (settings, 8),
    "devices": (devices, 3),
    "text": (text, 6),
    "prepared": (prepared, 12),
    "half prepared": (half_prepared, 5),
    "tokenizer": (tokenizer, 5),
    "sentencepiece": (sentencepiece_model, 2),
    "vocabulary": (vocabulary, 4),
    "model": (model, 10),
    "nanotron": (nanotron_checkpoint, 6),
    "released": (released, 3),
    "released data": (released_data, 3),
    "checkpoint": (checkpoint, 6),
    "copy": (copy, 1),
    "run": (run, 2),
    "cache": (cache, 5),
    "network": (network, 1),
}
assert sum(share for _, share in INPUTS.values()) == 100


def make(kind: str, folder: Path) -> Reader:
    """Make a whole input in ``folder``; returns what reads all of it, and has."""
    folder.mkdir(parents=True)
    read = INPUTS[kind][0](folder)
    read()
    return read


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def one_line(error: BaseException) -> Iterable[str]:
    """What is wrong with what an error says."""
    said = str(error)
    if not isinstance(error, ValueError):
        yield f"{type(error).__name__}: {said[:300]}"
    if "\n" in said or len(said) > 3000 or not said:
        yield f"no line: {said[:300]}"
