"""Models side by side on held-out windows: loss, perplexity, bits per byte, and how sure that is.

Every model sees the same windows, so their differences are taken window by window (paired): what makes a window hard
for both cancels, and small differences show that two separate errors would hide.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shear_tron.checkpoint.model_folder import is_nanotron
from shear_tron.data.manifest import Manifest
from shear_tron.data.sampler import held_out
from shear_tron.data.tokenizer import load
from shear_tron.progress import bar
from shear_tron.use.network import Network, open_network

log = getLogger(__name__)


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error (NaN for one value)."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> "Mean":
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), error)

    @classmethod
    def average(cls, means: Sequence["Mean"]) -> "Mean":
        """Of independent means, each with the same weight."""
        return cls(
            sum(mean.value for mean in means) / len(means),
            math.sqrt(sum(mean.error**2 for mean in means)) / len(means),
        )

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def compare(
    models: Sequence[str], data: str, sequence: int = 2048, windows: int = 64, batch: int = 1, device: str = "auto"
) -> dict[str, Any]:
    """Losses of ``models`` on up to ``windows`` held-out windows of every domain of ``data``. JSON's types only.

    losses in nats per token, with standard errors over windows; ``mean`` is of the domains, each with the same weight.
    bits_per_byte counts the bytes of the text that the tokens spell; None for a tokenizer that does not say.
    differences: each model after the first minus the first. ValueError for data made with another tokenizer, which a
    nanotron checkpoint does not have and is not asked for, and for a model given twice.
    """
    if len(set(models)) < len(models):
        raise ValueError(f"models={list(models)} names a model twice; give each once")
    manifest = Manifest.read(data)
    for model in models:
        if not is_nanotron(model):
            Manifest.read(data, tokenizer=model)
    chosen = {name: held_out(manifest, name, sequence, windows) for name in _held_out_domains(manifest)}
    lengths = _byte_lengths(next((model for model in models if not is_nanotron(model)), None))
    found: dict[str, dict[str, Tensor]] = {}
    told: dict[str, Any] = {}
    for model in models:
        network = open_network(model, device)
        with bar(model, sum(map(len, chosen.values())), "windows") as done:
            found[model] = {name: _losses(network, tokens, batch, done.update) for name, tokens in chosen.items()}
        told[model] = {"parameters": network.parameters, "domains": {}}
        for name, losses in found[model].items():
            told[model]["domains"][name] = _told(losses, chosen[name][:, 1:], lengths)
        told[model]["mean"] = _mean(told[model]["domains"].values())
    differences = {}
    for model in models[1:]:
        pairs = {name: Mean.of(losses - found[models[0]][name]) for name, losses in found[model].items()}
        differences[model] = {name: _pair(mean) for name, mean in [*pairs.items(), ("mean", _average(pairs))]}
    counts = {name: len(tokens) for name, tokens in chosen.items()}
    return {"data": data, "sequence": sequence, "windows": counts, "models": told, "differences": differences}


def _held_out_domains(manifest: Manifest) -> list[str]:
    """Those with held-out tokens; of the others the reader is told."""
    found = [name for name, domain in manifest.domains.items() if domain.held_out]
    if not found:
        raise ValueError(f"no domain of {manifest.folder} has held-out tokens; prepare it with a held_out share")
    if left := [name for name in manifest.domains if name not in found]:
        log.warning("without held-out tokens, so not measured: %s", ", ".join(left))
    return found


@torch.inference_mode()
def _losses(network: Network, windows: Tensor, batch: int, done: Callable[[int], object]) -> Tensor:
    """Mean loss of each window, float64 [windows]."""
    losses = []
    for rows in torch.split(windows, batch):
        logits = network.logits(rows[:, :-1].to(network.device))
        labels = rows[:, 1:].to(network.device)
        for one, label in zip(logits, labels, strict=True):
            losses.append(F.cross_entropy(one.float(), label).double().cpu())
        done(len(rows))
    return torch.stack(losses)


def _byte_lengths(tokenizer: str | None) -> "np.ndarray[Any, Any] | None":
    lengths = None if tokenizer is None else load(tokenizer).byte_lengths()
    return None if lengths is None else np.array(lengths)


def _told(losses: Tensor, labels: Tensor, lengths: "np.ndarray[Any, Any] | None") -> dict[str, float | None]:
    mean = Mean.of(losses)
    spelt = None if lengths is None else int(lengths[labels.numpy()].sum())
    per_byte = float(losses.sum()) * labels.shape[1] / math.log(2) / spelt if spelt else None
    return _pair(mean) | {"perplexity": math.exp(mean.value), "bits_per_byte": per_byte}


def _pair(mean: Mean) -> dict[str, float | None]:
    return {"loss": mean.value, "standard_error": None if math.isnan(mean.error) else mean.error}


def _average(means: dict[str, Mean]) -> Mean:
    return Mean.average(list(means.values()))


def _mean(domains: Any) -> dict[str, float | None]:
    """The domains' mean loss and bits per byte, and the perplexity that belongs to the loss."""
    domains = list(domains)
    errors = [math.nan if each["standard_error"] is None else each["standard_error"] for each in domains]
    mean = Mean.average([Mean(each["loss"], error) for each, error in zip(domains, errors, strict=True)])
    per_byte = [each["bits_per_byte"] for each in domains]
    whole = None if None in per_byte else sum(per_byte) / len(per_byte)
    return _pair(mean) | {"perplexity": math.exp(mean.value), "bits_per_byte": whole}


def table(result: dict[str, Any]) -> str:
    """What ``compare`` found, as text: a block for each model, and its paired difference to the first."""
    width = max(len(name) for name in [*result["windows"], "domain"])
    lines = [f"{result['data']}: windows of {result['sequence']:,} tokens; loss in nats per token ± standard error"]
    for model, told in result["models"].items():
        against = result["differences"].get(model)
        first = next(iter(result["models"]))
        lines += ["", f"{model}: {told['parameters']:,} parameters"]
        head = f"{'domain':{width}}  windows  {'loss':>17}  perplexity  bits/byte"
        lines.append(head + (f"  {'minus ' + first:>19}" if against else ""))
        for name, row in [*told["domains"].items(), ("mean", told["mean"])]:
            windows = result["windows"].get(name, sum(result["windows"].values()))
            per_byte = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
            line = f"{name:{width}}  {windows:7}  {_spell(row):>17}  {row['perplexity']:10.4g}  {per_byte:>9}"
            lines.append(line + (f"  {_spell(against[name], '+'):>19}" if against else ""))
    return "\n".join(lines)


def _spell(row: dict[str, float | None], sign: str = "") -> str:
    error = "?" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
    return f"{row['loss']:{sign}.4f} ± {error}"
