"""A GGUF file for llama.cpp: names, metadata and vocabulary as llama.cpp's own converter writes them, tensor by tensor.

Rows of q and k heads go from rotary halves (Hugging Face) to neighbouring pairs (llama.cpp). Norms are stored in
float32 whatever the rest is, as llama.cpp wants them.
"""

import math
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from torch import Tensor

from shear_tron.architecture import Architecture, Rope
from shear_tron.checkpoint.atomic import atomic
from shear_tron.checkpoint.gguf_vocab import add_vocabulary
from shear_tron.checkpoint.nanotron_pieces import turn
from shear_tron.checkpoint.safetensors_stream import storable
from shear_tron.params import count, params
from shear_tron.shape import Shape

Kind = Literal["float32", "float16", "bfloat16", "q8_0"]
_KINDS: Mapping[str, tuple[Any, Any]] = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_NAMES = {
    "embed": "token_embd",
    "attn_norm": "blk.{}.attn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "o": "blk.{}.attn_output",
    "mlp_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}


def write(
    file: str | Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    kind: Kind = "bfloat16",
    tokenizer_from: str | Path,
) -> None:
    """Write one ``.gguf`` file, whole or not at all.

    tensors: (our name, tensor) in the order of ``shear_tron.params.params``; one at a time is in memory. kind: of
    matrices; with q8_0 (blocks of 32, one scale each) a matrix whose rows are no multiple of 32 is float16, as in
    llama.cpp. tokenizer_from: a Hugging Face folder. Raises ValueError for a tensor out of order, missing or misshaped,
    a pre-tokenizer that llama.cpp is not known to have, and where ``file`` exists or does not end in ``.gguf``.
    """
    file = Path(file)
    if file.suffix != ".gguf":
        raise ValueError(f"{file} is no name of a GGUF file; use {file.with_suffix('.gguf')}")
    with atomic(file) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        _add_metadata(writer, file.stem, architecture, kind)
        add_vocabulary(writer, Path(tokenizer_from), architecture.shape.vocab)
        factors = _rope_factors(architecture.rope, architecture.shape.head_dim)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        wanted = list(params(architecture))
        types = [_type(kind, param.size) for param in wanted]
        for param, (stored, length) in zip(wanted, types, strict=True):
            name = _NAMES[param.row.leaf].format(param.layer) + ".weight"
            writer.add_tensor_info(name, param.size, np.dtype(np.float32), length, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        given = iter(tensors)
        for param, (stored, _) in zip(wanted, types, strict=True):
            name, tensor = next(given, ("nothing", torch.empty(0)))
            if name != param.name:
                raise ValueError(f"{name} came where {param.name} was due; give every tensor once and in order")
            if tuple(tensor.shape) != param.size:
                raise ValueError(f"{name} has size {list(tensor.shape)}; this model's is {list(param.size)}")
            weight = storable(name, tensor, torch.float32)
            if param.row.leaf in ("q", "k"):
                weight = turn(weight, architecture.shape.head_dim)
            writer.write_tensor_data(gguf.quants.quantize(weight.contiguous().numpy(), stored))
        if (extra := next(given, None)) is not None:
            raise ValueError(f"{extra[0]} is not a tensor of this model; leave it out")
        writer.close()


def without_k_quants(shape: Shape) -> list[str]:
    """Lengths of rows that llama.cpp's k-quants do not take (multiples of 256), as ``name=size``; it stores those
    matrices in a larger type."""
    rows = {"hidden": shape.hidden, "heads x head_dim": shape.heads * shape.head_dim, "ffn": shape.ffn}
    return [f"{name}={size}" for name, size in rows.items() if size % 256]


def kind(dtype: str | None) -> Kind:
    """ValueError where there is no such kind of GGUF file."""
    found: Kind | None = next((each for each in get_args(Kind) if each == dtype), None)
    if found is None:
        raise ValueError(f"dtype={dtype} is no kind of GGUF file; use one of {', '.join(get_args(Kind))}")
    return found


def _type(kind: Kind, size: tuple[int, ...]) -> tuple[Any, int]:
    """How a tensor is stored, and its bytes."""
    stored = _KINDS[kind][0] if len(size) > 1 else gguf.GGMLQuantizationType.F32
    block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
    if size[-1] % block:
        stored, block, block_bytes = gguf.GGMLQuantizationType.F16, 1, 2
    return stored, prod(size) // block * block_bytes


def _add_metadata(writer: Any, name: str, architecture: Architecture, kind: Kind) -> None:
    shape = architecture.shape
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(count(architecture), 0, 0, 0))
    writer.add_block_count(shape.layers)
    writer.add_context_length(architecture.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(architecture.rope.theta)
    writer.add_layer_norm_rms_eps(architecture.norm_eps)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_file_type(_KINDS[kind][1])
    writer.add_vocab_size(shape.vocab)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope_factors(rope: Rope, head_dim: int) -> "np.ndarray[Any, Any] | None":
    """What llama.cpp divides each rotary frequency by (Llama 3.1's stretching), float32 [head_dim / 2]."""
    if rope.factor == 1.0:
        return None
    frequency = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    turns = rope.original_context * frequency / (2 * math.pi)  # in the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return (1 / (smooth + (1 - smooth) / rope.factor)).astype(np.float32)
