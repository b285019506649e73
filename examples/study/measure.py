"""What a study measures of a model: losses of windows, choices among continuations, and which units were kept."""

from pathlib import Path

import torch
from torch import Tensor

from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.huggingface import Weights, read_architecture
from shear_tron.data.manifest import Manifest
from shear_tron.data.sampler import held_out
from shear_tron.model.transformer import Transformer
from shear_tron.params import params
from shear_tron.pruning.make import read_method
from shear_tron.train.run_folder import RunFolder

PROMPT, CONTINUATION = 64, 32  # tokens
BATCH = 32


def open_model(folder: Path) -> Transformer:
    architecture = read_architecture(folder)
    weights, model = Weights.open(folder, architecture), Transformer(architecture)
    model.load_state_dict({each.name: weights.read(each.name) for each in params(architecture)})
    return model.eval()


@torch.no_grad()
def _token_losses(model: Transformer, windows: Tensor) -> Tensor:
    """[windows, tokens - 1]"""
    found = []
    for rows in windows.split(BATCH):
        logits = model(rows[:, :-1]).flatten(0, 1)
        labels = rows[:, 1:]
        found.append(torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels))
    return torch.cat(found)


def window_losses(folder: Path, tokens: Path, sequence: int, windows: int) -> dict[str, list[float]]:
    """Mean loss of each of a domain's first held-out windows, nats per token."""
    model, manifest = open_model(folder), Manifest.read(str(tokens))
    found = {}
    for name in manifest.domains:
        losses = _token_losses(model, held_out(manifest, name, sequence, windows)).mean(1)
        found[name] = [round(loss, 5) for loss in losses.tolist()]
    return found


def choice_accuracy(folder: Path, tokens: Path, items: int) -> dict[str, float]:
    """How often a prompt's own continuation is likelier than three others' of its domain; by chance 0.25.

    Item i is the domain's i-th held-out window; the others' continuations are those of the next three.
    """
    model, manifest = open_model(folder), Manifest.read(str(tokens))
    found = {}
    for name in manifest.domains:
        windows = held_out(manifest, name, PROMPT + CONTINUATION, items)
        prompts, own = windows[:, :PROMPT], windows[:, PROMPT : PROMPT + CONTINUATION]
        options = [torch.cat((prompts, own.roll(-turn, 0)), 1) for turn in range(4)]
        losses = torch.stack([_token_losses(model, each)[:, PROMPT - 1 :].sum(1) for each in options])
        found[name] = float((losses.argmin(0) == 0).double().mean())
    return found


def kept_units(run: Path) -> dict[str, list[list[int]]]:
    """Indices of the units that a pruning run decided for, by kind and layer."""
    folder = RunFolder.open(run)
    assert folder.config.prune is not None
    target = folder.config.prune.target.shape(folder.source.shape)
    masks = read_method(folder.config.prune, folder.source, target, sharded.Reader(folder.checkpoint).read).decide()
    return {
        kind: [row.nonzero().flatten().tolist() for row in mask.reshape(-1, mask.shape[-1])]
        for kind, mask in masks.items()
    }
