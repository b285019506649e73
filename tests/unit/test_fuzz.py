"""Thousands of damaged inputs, the same ones every time: each is read, or refused in one line; none hangs or unfolds.

``SHEAR_TRON_FUZZ=100000`` asks for more of them (`make soak`).
"""

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.huggingface import Weights, read_architecture, write
from shear_tron.config import load
from shear_tron.data.manifest import Domain, Manifest, Shard
from shear_tron.params import params
from shear_tron.shape import Shape
from shear_tron.train.config import RunConfig

CASES = int(os.environ.get("SHEAR_TRON_FUZZ", "10000"))
SHAPE = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16, vocab=32)
CONFIG = {
    "run": "runs/x",
    "model": "m",
    "data": {"folder": "d", "sequence": 16, "weights": {"a": 1.0, "b": 2.0}, "reference_losses": {"a": 1.0}},
    "train": {"steps": 14, "batch": 8, "micro_batch": 1},
    "optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.95]},
    "prune": {"target": {"hidden": 8, "ffn": 8}, "warmup_steps": 6},
}
WORDS = '[ ] { } " : , &a *a !! - NaN 1e999 null true ../ <<: ? | -1 0 1.5 "x" {} []'
TOKENS = (*WORDS.split(" "), "\\", "\xe9", "\0", "\n", "\t", ": ", "- ", "9" * 400, "[" * 200)


def folder_of(kind: str, path: Path) -> Callable[[], object]:
    """A good input in ``path``, and what reads it."""
    path.mkdir()
    if kind == "config":
        (path / "x.yaml").write_text(yaml.safe_dump(CONFIG))
        return lambda: load(RunConfig, path / "x.yaml")
    if kind == "override":
        (path / "x.yaml").write_text(yaml.safe_dump(CONFIG))
        (path / "override").write_text("data.weights={a: 1, b: 2}")
        return lambda: load(RunConfig, path / "x.yaml", [(path / "override").read_text(errors="replace")])
    if kind == "domains":
        (path / "a.ds").write_bytes(bytes(64))
        (path / "a.ds.index").write_bytes(bytes(8))
        shard = Shard("a.ds", 32, 1, "0" * 64)
        Manifest(str(path), "t", "0" * 64, 32, 2, None, 0, 0.1, {"a": Domain((shard,), ())}).write()
        return lambda: Manifest.read(str(path))
    if kind == "model":
        draw = torch.Generator().manual_seed(0)
        tensors = [(each.name, torch.randn(each.size, generator=draw)) for each in params(Architecture(SHAPE))]
        write(path / "hf", Architecture(SHAPE), tensors)
        return lambda: Weights.open(path / "hf", read_architecture(path / "hf"))
    checkpoint = path / "step-00000003"
    checkpoint.mkdir()
    save_file({"a": torch.ones(3)}, checkpoint / "a.safetensors")
    files = {"a.safetensors": {"bytes": (checkpoint / "a.safetensors").stat().st_size, "sha256": "0" * 64}}
    (checkpoint / sharded.PROGRESS).write_text(sharded.sealed({"step": 3, "files": files, "state": {"health": {}}}))
    return lambda: sharded.progress(checkpoint)


def damage(content: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, doubled, spliced with what parsers trip over; now and then something else altogether."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 30])):
        place = draw.randrange(len(changed) + 1)
        how = draw.randrange(6)
        if how == 0 and place < len(changed):
            changed[place] = draw.randrange(256)
        elif how == 1:
            del changed[place : place + draw.choice([1, 3, 20])]
        elif how == 2:
            changed[place:place] = draw.choice(TOKENS).encode()
        elif how == 3:
            changed[place:place] = changed[place : place + draw.randrange(40)]
        elif how == 4:
            del changed[place:]
        else:
            end = place + draw.randrange(8)
            changed[place:end] = draw.choice(TOKENS).encode()
    return bytes(changed)


def swapped(content: bytes, draw: random.Random) -> bytes:
    """A well-formed document with one value replaced by another kind of value."""
    value = json.loads(content)
    places = list(_places(value))
    holder, key = draw.choice(places)
    holder[key] = draw.choice([None, True, -1, 2**70, 0.5, "x", "", "../../etc", [], [1], {}, {"a": {}}, "0" * 5000])
    return json.dumps(value).encode()


def _places(value: object):  # type: ignore[no-untyped-def]
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])  # type: ignore[index]


SHARES = {"config": 0.2, "override": 0.1, "domains": 0.3, "model": 0.2, "checkpoint": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), SHARES.items(), ids=SHARES.keys())
def test_damaged_input_is_read_or_refused_in_one_line(kind: str, share: float, tmp_path: Path) -> None:
    read = folder_of(kind, tmp_path / kind)
    read()
    suffixes = {".yaml", ".json", ".safetensors"} if kind != "override" else {""}
    targets = [file for file in (tmp_path / kind).rglob("*") if file.is_file() and file.suffix in suffixes]
    draw, told, slowest = random.Random(f"{kind} 1"), [], 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB
    for number in range(int(CASES * share)):
        file = targets[number % len(targets)]
        good = file.read_bytes()
        head = good[:4096]  # of safetensors, the header
        by_value = file.suffix == ".json" and draw.random() < 0.5
        file.write_bytes(swapped(good, draw) if by_value else damage(head, draw) + good[4096:])
        began = time.process_time()
        try:
            read()
        except ValueError as error:  # anything else fails the test
            told.append(str(error))
        finally:
            file.write_bytes(good)
        slowest = max(slowest, time.process_time() - began)
    assert slowest < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 500_000
    assert len(told) > CASES * share * 0.3
    assert not [text[:300] for text in told if "\n" in text or len(text) > 3000]
