"""Checkpoints of the paper's released code (princeton-nlp/LLM-Shearing, on MosaicML's composer), read and not written.

One pickled state dict of a LLaMA with multi-head attention, names of its own, and, of a pruning run that was not cut
yet, the logits of its masks: the hard-concrete gates that ``shear_tron.pruning.gates`` has too.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.params import params
from shear_tron.reading import first_line
from shear_tron.shape import Shape

_NAMES = {
    "embed": "model.transformer.wte.weight",
    "attn_norm": "model.transformer.blocks.{}.ln_1.weight",
    "q": "model.transformer.blocks.{}.attn.wq.weight",
    "k": "model.transformer.blocks.{}.attn.wk.weight",
    "v": "model.transformer.blocks.{}.attn.wv.weight",
    "o": "model.transformer.blocks.{}.attn.out_proj.weight",
    "mlp_norm": "model.transformer.blocks.{}.ln_2.weight",
    "gate": "model.transformer.blocks.{}.mlp.gate_proj.weight",
    "up": "model.transformer.blocks.{}.mlp.up_proj.weight",
    "down": "model.transformer.blocks.{}.mlp.down_proj.weight",
    "norm": "model.transformer.ln_f.weight",
    "lm_head": "model.transformer.output.weight",
}
_BLOCK = re.compile(r"model\.transformer\.blocks\.([0-9]{1,4})\.")
_MASKS = "model.l0_module.masks.{}.z_loga"
_KINDS = {"hidden": "hidden", "layer": "layers", "head": "kv_heads", "intermediate": "ffn"}  # of masks, theirs -> ours


@dataclass(frozen=True)
class Composer:
    """``logits``: of the masks, by our kinds; {} where the model was cut already, or was never to be."""

    architecture: Architecture
    logits: Mapping[str, Tensor]
    _state: Mapping[str, Tensor]
    _theirs: Mapping[str, str]  # by our names

    @classmethod
    def open(cls, file: str | Path, like: Architecture) -> "Composer":
        """Read a state dict, mapped from the file, with nothing but tensors allowed in it.

        like: the model that was pruned (LLaMA-2), for what a state dict does not say: head_dim, the norm's epsilon,
        rotary base and context. ValueError where the file holds other objects, or is of another kind of model.
        """
        state = _load(Path(file))
        layers = 1 + max((int(block[1]) for name in state if (block := _BLOCK.match(name))), default=-1)
        head_dim, lengths = like.shape.head_dim, {}
        for leaf in ("embed", "q", "gate"):
            tensor = state.get(_NAMES[leaf].format(0))
            if tensor is None or tensor.dim() != 2:
                raise ValueError(f"{file} has no matrix {_NAMES[leaf].format(0)}; give a LLaMA of the released code")
            lengths[leaf], hidden = tensor.shape
        heads, rest = divmod(lengths["q"], head_dim)
        if rest:
            raise ValueError(f"{file}: wq has {lengths['q']} rows, no heads of {head_dim}; give another --tokenizer")
        shape = Shape(hidden, layers, heads, heads, head_dim, ffn=lengths["gate"], vocab=lengths["embed"])
        architecture = Architecture(shape, like.rope, like.norm_eps, like.context)
        theirs = {param.name: _NAMES[param.row.leaf].format(param.layer) for param in params(architecture)}
        for param in params(architecture):
            found = state.get(theirs[param.name])
            if found is None or tuple(found.shape) != param.size:
                size = None if found is None else list(found.shape)
                raise ValueError(f"{file}: {theirs[param.name]} has size {size}, not {list(param.size)}")
        masks = {name.split(".")[3]: tensor for name, tensor in state.items() if name.endswith(".z_loga")}
        if strange := sorted(set(masks) - set(_KINDS)):
            raise ValueError(f"{file} prunes {', '.join(strange)}; only {', '.join(_KINDS)} can be taken over")
        return cls(architecture, {_KINDS[name]: tensor for name, tensor in masks.items()}, state, theirs)

    def names(self) -> list[str]:
        return list(self._theirs)

    def read(self, name: str) -> Tensor:
        return self._state[self._theirs[name]]

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        return self.read(name).narrow(axis, start, stop - start).contiguous()


def _load(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give a state dict of the released code, such as latest-rank0.pt")
    try:
        content: Any = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # where bytes are damaged, whatever the restricted unpickler comes upon
        reason = first_line(error)[:200]
        raise ValueError(
            f"{file} is damaged, or holds more than tensors, which is not loaded ({reason}); where it was "
            "made, torch.save(torch.load(file)['state']['model'], 'weights.pt') and import that"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state"), dict):
        content = content["state"].get("model")
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and type(value) is Tensor for name, value in content.items()
    ):
        raise ValueError(f"{file} is no state dict; give one of the released code, such as latest-rank0.pt")
    return {name: tensor for name, tensor in content.items() if "rotary" not in name}
