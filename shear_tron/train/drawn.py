"""What a run will ask a cache of its teacher for: which windows it draws, of what data, how many bytes that is."""

from math import ceil
from pathlib import Path

import numpy as np

from shear_tron.data.manifest import Manifest
from shear_tron.data.permutation import Integers
from shear_tron.data.sampler import Sampler, Windows
from shear_tron.train.cache import FILE, Cache, Facts, require_same
from shear_tron.train.config import RunConfig
from shear_tron.train.samples import sampler_of

HEADROOM = 3.0  # where the mixture moves, a domain may be asked for so much more than its start (docs/data.md)


def drawn(
    config: RunConfig, manifest: Manifest, mixture: dict[str, float], headroom: float | None = None
) -> dict[str, Integers]:
    """The windows that a run of ``mixture`` draws from each domain, sorted; ``headroom`` times as many of each, in the
    order in which it would come to them. None: ``HEADROOM`` where the mixture moves, else 1."""
    if headroom is None:
        headroom = HEADROOM if config.data.update_every and config.data.mixture.update != "constant" else 1.0
    sequence, seed, prune = config.data.sequence, config.train.seed, config.prune
    before = prune.calibration_batches * (1 + prune.rotate) if prune else 0  # that scoring and rotating use up at most
    samples = (before + config.train.steps) * config.train.batch
    sampler = sampler_of(config, manifest, list(mixture))
    earlier = sampler.state()["drawn"]
    domains = sampler.draw(samples, list(mixture.values())).domain
    found = {}
    for name, count in zip(mixture, np.bincount(domains, minlength=len(mixture)).tolist(), strict=True):
        most = Windows(manifest, manifest.domain(name).train, sequence).count
        own = Sampler(manifest, [name], sequence, seed)
        own.restore(own.state() | {"drawn": {name: earlier[name]}})
        found[name] = np.unique(own.draw(min(ceil(count * headroom), most), [1.0]).window)
    return found


def facts(config: RunConfig, manifest: Manifest, mixture: dict[str, float], vocab: int, **teacher: str) -> Facts:
    """Of the samples that a run learns from. teacher: its ``teacher`` and ``precision``, where that matters."""
    assert config.distill is not None
    return Facts.of(
        manifest,
        list(mixture),
        vocab=vocab,
        sequence=config.data.sequence,
        samples=config.distill.samples,
        temperature=config.distill.temperature,
        document_masking=config.data.document_masking,
        **{"teacher": "", "precision": "", **teacher},
    )


def missing(cache: Cache, windows: dict[str, Integers]) -> dict[str, Integers]:
    """Those of ``windows`` that a cache does not have."""
    there = cache.facts.domains
    return {name: np.setdiff1d(own, cache.windows(name)) if name in there else own for name, own in windows.items()}


def count(windows: dict[str, Integers]) -> int:
    return sum(map(len, windows.values()))


def require_cached(config: RunConfig, manifest: Manifest, mixture: dict[str, float], vocab: int) -> Cache:
    """The run's cache; ValueError unless it is of this data and has all windows that the starting mixture draws."""
    assert config.distill is not None
    cache = Cache(config.distill.cache or "")
    require_same(cache.folder, cache.facts, facts(config, manifest, mixture, vocab))
    wanted = drawn(config, manifest, mixture, headroom=1.0)
    if lacking := count(missing(cache, wanted)):
        raise ValueError(
            f"distill.cache={cache.folder} lacks {lacking:,} of the {count(wanted):,} windows that this run draws; "
            "fill it with `shear-tron cache-teacher CONFIG`"
        )
    return cache


def told(folder: Path, of: Facts, wanted: dict[str, Integers], lacking: dict[str, Integers]) -> str:
    """What a cache takes on disk, and how much of it is there."""
    gigabytes = of.token_bytes * of.sequence / 1e9  # of a window
    whole, more = (f"{count(part):,} windows, {count(part) * gigabytes:,.3g} GB" for part in (wanted, lacking))
    return f"{folder}: {of.samples} samples per token, {of.token_bytes} bytes; {whole}; still to be filled: {more}"


def forecast(config: RunConfig, manifest: Manifest, mixture: dict[str, float], vocab: int) -> str:
    """``told`` of a run's cache, which need not be there yet."""
    assert config.distill is not None
    folder, wanted = Path(config.distill.cache or ""), drawn(config, manifest, mixture)
    lacking = missing(Cache(folder), wanted) if (folder / FILE).exists() else wanted
    return told(folder, facts(config, manifest, mixture, vocab), wanted, lacking)
