"""A GGUF file for llama.cpp: names, metadata and vocabulary as llama.cpp's own converter writes them, tensor by tensor.

Where llama.cpp turns neighbouring rows of a head, those of q and k go from halves (Hugging Face) to pairs. Norms and
biases are stored in float32 whatever the rest is, as llama.cpp wants them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
from shear_tron.checkpoint.names import Names, Packed, stored, with_biases
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
_DTYPES = {  # of what is stored as torch has it
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_LAYER = {
    "embed": "token_embd.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "o": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_NAMES = with_biases(_LAYER)
_QKV = with_biases({**_LAYER, **dict.fromkeys("qkv", Packed("blk.{}.attn_qkv.weight", ("q", "k", "v"), "part"))})


@dataclass(frozen=True)
class Graph:
    """A network of llama.cpp's. ``turned``: its q and k heads turn neighbouring rows. ``biases``: those it can have.
    ``whole_heads``: takes hidden to be heads times head_dim. ``tied``: can do without a head of its own."""

    name: str
    turned: bool
    biases: frozenset[str] = frozenset()
    names: Names = field(default_factory=lambda: _NAMES)
    whole_heads: bool = False
    tied: bool = True


_EVERY = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
GRAPHS = {  # by our family
    "llama": Graph("llama", turned=True, biases=_EVERY),
    "mistral": Graph("llama", turned=True),
    "qwen2": Graph("qwen2", turned=False, biases=frozenset({"q", "k", "v"}), whole_heads=True),
    "qwen3": Graph("qwen3", turned=False),
    "smollm3": Graph("smollm3", turned=True),
    "gpt_neox": Graph("gptneox", turned=False, biases=_EVERY, names=_QKV, whole_heads=True, tied=False),
}


def require(architecture: Architecture) -> Graph:
    """llama.cpp's network for a model; ValueError where it has none that computes the same."""
    graph, shape = GRAPHS.get(architecture.family), architecture.shape
    if graph is None:
        raise ValueError(f"family={architecture.family} is not written as GGUF; use one of {', '.join(GRAPHS)}")
    if architecture.window is not None:
        raise ValueError(f"window={architecture.window}: llama.cpp's {graph.name} ignores it; use a model without")
    if graph.whole_heads and shape.hidden != shape.heads * shape.head_dim:
        raise ValueError(
            f"hidden={shape.hidden} is not heads={shape.heads} times head_dim={shape.head_dim}, which llama.cpp's "
            f"{graph.name} takes for granted; shear to hidden={shape.heads * shape.head_dim}"
        )
    if shape.tied and not graph.tied:
        raise ValueError(f"tied embeddings: llama.cpp's {graph.name} has none; use a model without")
    if strange := sorted(architecture.biases - graph.biases):
        raise ValueError(f"biases of {', '.join(strange)}: llama.cpp's {graph.name} has none; use a model without")
    fixed = frozenset(range(3, shape.layers, 4)) if graph.name == "smollm3" else frozenset()
    if architecture.unturned_layers != fixed:
        found = sorted(architecture.unturned_layers)
        raise ValueError(f"unturned_layers={found}: llama.cpp's {graph.name} has {sorted(fixed)}; keep such layers")
    return graph


def write(
    file: str | Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    kind: Kind = "bfloat16",
    tokenizer_from: str | Path,
) -> None:
    """Write one ``.gguf`` file, whole or not at all.

    tensors: (our name, tensor), each once; in the order of ``shear_tron.params.params`` one packed tensor is in memory
    at a time, in another order those that came too soon are too. kind: of matrices; with q8_0 (blocks of 32, one scale
    each) a matrix whose rows are no multiple of 32 is float16, as in llama.cpp. tokenizer_from: a Hugging Face folder.
    Raises ValueError for a missing, extra or misshaped tensor, for what llama.cpp lacks (``require``), a pre-tokenizer
    that it is not known to have, and where ``file`` exists or does not end in ``.gguf``.
    """
    file, graph = Path(file), require(architecture)
    if file.suffix != ".gguf":
        raise ValueError(f"{file} is no name of a GGUF file; use {file.with_suffix('.gguf')}")
    with atomic(file) as partial:
        writer = gguf.GGUFWriter(partial, graph.name)
        _add_metadata(writer, file.stem, architecture, kind)
        add_vocabulary(writer, Path(tokenizer_from), architecture.shape.vocab)
        factors = _rope_factors(architecture.rope, architecture.shape.head_dim)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        due = [(each, *_type(kind, each.size)) for each in stored(architecture, graph.names)]
        for each, quantised, length in due:
            writer.add_tensor_info(each.name, each.size, np.dtype(np.float32), length, raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        waiting = {param.name: param for param in params(architecture)}
        found: dict[str, Tensor] = {}
        for name, tensor in tensors:
            param = waiting.pop(name, None)
            if param is None:
                raise ValueError(f"{name} is not a tensor of this model, or came twice; give every tensor once")
            if tuple(tensor.shape) != param.size:
                raise ValueError(f"{name} has size {list(tensor.shape)}; this model's is {list(param.size)}")
            dtype = _DTYPES.get(_type(kind, param.size)[0], torch.float32)
            weight = storable(name, tensor, dtype)
            turned = graph.turned and param.row.leaf.removesuffix("_bias") in ("q", "k")
            found[name] = turn(weight, architecture.shape.head_dim) if turned else weight
            while due and all(param.name in found for param in due[0][0].params):
                each, quantised, _ = due.pop(0)
                packed = each.pack([found.pop(param.name) for param in each.params]).contiguous()
                if quantised in _DTYPES:
                    writer.write_tensor_data(packed.view(torch.uint8).numpy())
                else:
                    writer.write_tensor_data(gguf.quants.quantize(packed.numpy(), quantised))
        if waiting:
            raise ValueError(f"{next(iter(waiting))} was not given ({len(waiting)} missing in all)")
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
    quantised = _KINDS[kind][0] if len(size) > 1 else gguf.GGMLQuantizationType.F32
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantised]
    if size[-1] % block:
        quantised, block, block_bytes = gguf.GGMLQuantizationType.F16, 1, 2
    return quantised, prod(size) // block * block_bytes


def _add_metadata(writer: Any, name: str, architecture: Architecture, kind: Kind) -> None:
    shape, rope = architecture.shape, architecture.rope
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(count(architecture), 0, 0, 0))
    writer.add_block_count(shape.layers)
    writer.add_context_length(architecture.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(int(rope.share * shape.head_dim))
    if architecture.norm == "layer":
        writer.add_layer_norm_eps(architecture.norm_eps)
        writer.add_parallel_residual(architecture.parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(architecture.norm_eps)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_file_type(_KINDS[kind][1])
    writer.add_vocab_size(shape.vocab)
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
