"""Hugging Face folders in and out: config.json, safetensors, tokenizer. Strict both ways, one tensor at a time.

Names and layouts are Hugging Face's own (``shear_tron.params`` holds the renaming), so nothing is permuted.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface_config import TOKEN_IDS, architecture_config, read_architecture
from shear_tron.checkpoint.safetensors_stream import DTYPES, Entry, Writer, entries, open_file, read_json
from shear_tron.params import Param, params

__all__ = ["Weights", "architecture_config", "read_architecture", "write"]

# WIP until names.py
_HF = {
    "embed": "model.embed_tokens.weight", "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight", "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight", "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight", "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight", "down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight", "lm_head": "lm_head.weight",
}  # fmt: skip


def hf_name(param: Param) -> str:
    return _HF[param.row.leaf].format(param.layer)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of these


@dataclass(frozen=True)
class Weights:
    """The weights of a Hugging Face folder, read when asked for."""

    architecture: Architecture
    _entries: Mapping[str, Entry]  # by our names

    @classmethod
    def open(cls, folder: str | Path, architecture: Architecture) -> "Weights":
        """Check from the files' headers that they hold exactly the tensors of ``architecture``.

        Raises ValueError for a missing, extra, misshaped or quantised tensor and for a damaged file, naming it. Two
        extras are harmless and let pass: rotary frequencies (computed anyway), and beside tied embeddings an
        ``lm_head.weight``, provided that its values (read for this) are the embedding's.
        """
        folder = Path(folder)
        found = entries(folder)
        parameters = {hf_name(parameter): parameter for parameter in params(architecture)}
        for hf in found:
            redundant = hf.endswith("rotary_emb.inv_freq") or (hf == "lm_head.weight" and architecture.shape.tied)
            if hf not in parameters and not redundant:
                raise ValueError(f"{found[hf].path} holds {hf}, which this model lacks; check config.json")
        for parameter in parameters.values():
            _check(folder, parameter, found)
        if architecture.shape.tied and "lm_head.weight" in found:
            _check_tied_head(found["model.embed_tokens.weight"], found["lm_head.weight"])
        return cls(architecture, {parameter.name: found[hf] for hf, parameter in parameters.items()})

    def names(self) -> list[str]:
        """Our names of all tensors, in the order of ``shear_tron.params.params``."""
        return list(self._entries)

    def read(self, name: str) -> Tensor:
        """One whole tensor in its stored dtype, mapped from its file: pages are read as they are used."""
        tensor: Tensor = open_file(self._entries[name].path).get_tensor(self._entries[name].name)
        return tensor

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` along ``axis`` (0 or 1) of one tensor; only they are kept in memory."""
        size = self._entries[name].size
        if not 0 <= axis < len(size):
            raise ValueError(f"axis={axis} is not an axis of {name} {list(size)}; use 0 to {len(size) - 1}")
        if not 0 <= start <= stop <= size[axis]:
            raise ValueError(f"{start}:{stop} is not within axis {axis} of {name} {list(size)}; use 0:{size[axis]}")
        index = (*(slice(None) for _ in range(axis)), slice(start, stop))
        part: Tensor = open_file(self._entries[name].path).get_slice(self._entries[name].name)[index]
        return part.contiguous()


def _check(folder: Path, parameter: Param, found: Mapping[str, Entry]) -> None:
    entry = found.get(hf_name(parameter))
    if entry is None:
        raise ValueError(
            f"{folder} lacks {hf_name(parameter)}, which config.json asks for; fetch the whole folder again"
        )
    if entry.size != parameter.size:
        raise ValueError(
            f"{entry.path}: {hf_name(parameter)} has size {list(entry.size)}, config.json asks for {list(parameter.size)}; "
            "use weights and config.json of one model"
        )
    if entry.dtype not in DTYPES:
        raise ValueError(f"{entry.path}: {hf_name(parameter)} is {entry.dtype}; use weights in {', '.join(DTYPES)}")


def _check_tied_head(embed: Entry, head: Entry, rows: int = 8192) -> None:
    same = embed.size == head.size
    if same:
        with open_file(embed.path) as one, open_file(head.path) as two:
            left, right = one.get_slice("model.embed_tokens.weight"), two.get_slice("lm_head.weight")
            same = all(torch.equal(left[i : i + rows], right[i : i + rows]) for i in range(0, embed.size[0], rows))
    if not same:
        raise ValueError(
            f"{head.path}: lm_head.weight differs from the embedding though config.json ties them; "
            "set tie_word_embeddings to false or remove lm_head.weight"
        )


def write(
    folder: str | Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    tokenizer_from: str | Path | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write a folder that ``LlamaForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` open.

    tensors: (our name, tensor), each once, in any order and on any device; one at a time is in memory. dtype: what to
    store; None is the first tensor's, and another's must be the same. tokenizer_from: a folder whose tokenizer files
    and special token ids are taken over. Nothing appears at ``folder`` until all of it is written. Raises ValueError
    for a missing, extra or misshaped tensor, for sizes that transformers refuses (``architecture_config``), and where
    ``folder`` already holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder or remove it")
    source = None if tokenizer_from is None else Path(tokenizer_from)
    if source is not None and not any((source / file).exists() for file in _VOCABULARIES):
        raise ValueError(f"{source} has no tokenizer ({', '.join(_VOCABULARIES)}); give the folder of the source model")
    architecture_config(architecture, torch.float32)  # raises now, not after the last tensor
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        stored = _write_tensors(partial, architecture, tensors, dtype, shard_bytes)
        config = architecture_config(architecture, stored)
        if source is not None:
            _copy_tokenizer(source, partial, config)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_tensors(
    folder: Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    shard_bytes: float,
) -> torch.dtype:
    """Write all tensors; returns the dtype they have on disk."""
    sizes = {hf_name(parameter): parameter.size for parameter in params(architecture)}
    hf_names = {parameter.name: hf_name(parameter) for parameter in params(architecture)}
    writer: Writer | None = None
    stored = dtype
    for name, tensor in tensors:
        if writer is None or stored is None:
            stored = tensor.dtype if dtype is None else dtype
            writer = Writer(folder, sizes, stored, shard_bytes)
        if dtype is None and tensor.dtype != stored:
            raise ValueError(f"{name} is {tensor.dtype}, tensors before it {stored}; name the dtype to store")
        if name not in hf_names:
            raise ValueError(f"{name} is not a tensor of this model; leave it out")
        writer.write(hf_names[name], tensor)
    if writer is None or stored is None:
        raise ValueError("no tensors were given; give every tensor of the model once")
    writer.close()
    return stored


def _copy_tokenizer(source: Path, folder: Path, config: dict[str, Any]) -> None:
    for file in TOKENIZER_FILES:
        if (source / file).exists():
            shutil.copyfile(source / file, folder / file)
    if (source / "config.json").exists():
        theirs = read_json(source / "config.json")
        config.update({key: theirs[key] for key in TOKEN_IDS if key in theirs})
