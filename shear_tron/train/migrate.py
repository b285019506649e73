"""From another trainer's checkpoint to a Hugging Face folder, which can then be sheared or trained on."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.composer import Composer
from shear_tron.checkpoint.model_folder import Form, Model, open_model, read_architecture, write_model
from shear_tron.data.tokenizer import load
from shear_tron.hub import located
from shear_tron.masks import Masks
from shear_tron.params import count
from shear_tron.pruning.extract import extract
from shear_tron.pruning.gates import SHARPNESS, TEMPERATURE, Gates
from shear_tron.shape import Shape
from shear_tron.train.outputs import shown


def import_model(checkpoint: str, output: str, tokenizer: str, dtype: str | None, target: str | None = None) -> str:
    """Make a Hugging Face folder of a nanotron checkpoint, or of a state dict of the paper's released code (a file).

    tokenizer: a folder or Hub id; for a state dict it is the source model's, with config.json. dtype None keeps the
    stored one. target: for the state dict of a pruning run that was not cut, what to cut out of it, such as
    ``hidden=2048,layers=24,heads=16,ffn=5504``. Returns a sentence. ValueError where ``checkpoint`` is not whole or has
    another forward, the tokenizer has more ids, or a target is missing or not wanted.
    """
    architecture: Architecture
    if Path(checkpoint).is_dir():
        if target is not None:
            raise ValueError(f"target={target} is for pruning runs of the released code; {checkpoint} is a folder")
        model = open_model(checkpoint)
        architecture, tensors = model.architecture, _all(model)
    else:
        architecture, tensors = _composer(checkpoint, tokenizer, target)
    ids, rows = load(tokenizer).vocab, architecture.shape.vocab
    if ids > rows:
        raise ValueError(f"{tokenizer} has {ids} ids, {checkpoint} vocab={rows}; give the model's own tokenizer")
    write_model(output, architecture, shown(tensors, architecture, output), Form(dtype=dtype), located(tokenizer))
    return f"{output}: {count(architecture):,} parameters: {architecture.shape}"


def _composer(file: str, like: str, target: str | None) -> tuple[Architecture, Iterable[tuple[str, Tensor]]]:
    model = Composer.open(file, read_architecture(like))
    source = model.architecture.shape
    if target is None and model.logits:
        sizes = "hidden=..,layers=..,heads=..,ffn=.."
        raise ValueError(f"{file} is of a pruning run that was not cut; say to what with --target {sizes}")
    if target is None:
        return model.architecture, _all(model)
    if not model.logits:
        raise ValueError(f"target={target}: {file} has no masks (it was cut already); leave --target out")
    return extract(model.read, masks_of(model.logits, source, _target(target, source)), model.architecture)


def _all(model: Model) -> Iterable[tuple[str, Tensor]]:
    return ((name, model.read(name)) for name in model.names())


def _target(text: str, source: Shape) -> Shape:
    try:
        sizes: dict[str, Any] = {key: int(size) for key, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        sizes = {}
    if set(sizes) - {"hidden", "layers", "heads", "ffn"} or not sizes:
        raise ValueError(f"target={text!r} is not of the form hidden=2048,layers=24,heads=16,ffn=5504")
    return replace(source, **sizes, kv_heads=sizes.get("heads", source.kv_heads))


def masks_of(logits: Mapping[str, Tensor], source: Shape, target: Shape) -> Masks:
    """The released code's masks without noise: exactly the target's counts, kept units with soft values.

    A kind that the target does not shorten keeps all of its units and their soft values, as it does there.
    """
    gates = Gates(source, target)
    if missing := sorted(set(gates.logits) - set(logits)):
        raise ValueError(f"the target prunes {', '.join(missing)}, for which the run had no masks; leave them out")
    gates.load_state_dict({kind: logits[kind].float() for kind in gates.logits})
    whole = {kind: torch.sigmoid(each.float() * (SHARPNESS / TEMPERATURE)) for kind, each in logits.items()}
    return replace(gates.decide(), **{kind: value for kind, value in whole.items() if kind not in gates.logits})
