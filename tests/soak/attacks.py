"""What an attacker typed, and what shear-tron answers: `python tests/soak/attacks.py > docs/attacks.md`.

Every attack ends with one line of ours on stderr and a status that is not 0, or this script does.
"""

import contextlib
import fcntl
import gzip
import io
import json
import os
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "end_to_end")]

import torch  # noqa: E402
from conftest import make_world  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from shear_tron import cli  # noqa: E402

WILD = "optimizer.learning_rate={} train.steps=8 checkpoint.every=1 prune=null data.update_every=0"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MORE = "train prune.yaml prune.warmup_steps=1 train.steps=4"
LINE = 1 << 30  # bytes of one line in a .gz


def edit(file: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edited(world: Path) -> None:
        content = json.loads((world / file).read_text())
        change(content)
        (world / file).write_text(json.dumps(content))

    return edited


def write(file: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda world: (
        (world / file).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def nan_weight(world: Path) -> None:
    weights = load_file(world / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, world / "model" / "model.safetensors", metadata={"format": "pt"})


def strange_tokens(world: Path) -> None:
    for file in (world / "data").rglob("train/*.ds"):
        file.write_bytes(b"\xff" * file.stat().st_size)


def flip(pattern: str) -> Callable[[Path], None]:
    """A bit, in the middle of the first such file."""

    def flipped(world: Path) -> None:
        file = sorted(world.glob(pattern))[0]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return flipped


def held(world: Path) -> None:
    """Its lock, as by another process."""
    lock = os.open(world / "prune" / ".lock", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.write(lock, b"process 4711 on node-3")
    fcntl.flock(lock, fcntl.LOCK_EX)


def unfolding_line(world: Path) -> None:
    """A line of a gigabyte in a megabyte, and a good one after it."""
    with gzip.open(world / "text" / "bomb.jsonl.gz", "wb", compresslevel=6) as out:
        out.write(b'{"text": "')
        for _ in range(LINE >> 20):
            out.write(b"x" * (1 << 20))
        out.write(b'"}\n{"text": "one two three"}\n')
    write("bomb.yaml", "output: data2\ntokenizer: model\nworkers: 1\ndomains: {bomb: {path: text/bomb.jsonl.gz}}\n")(
        world
    )


def pickled(world: Path) -> None:
    (world / "model" / "model.safetensors").rename(world / "model" / "pytorch_model.bin")


def set_(key: str, value: object) -> Callable[[dict], None]:
    return lambda content: content.__setitem__(key, value)


def shard(content: dict) -> dict:
    return next(iter(content["domains"].values()))["train"][0]


HEAD = """# Attacks, and their answers

Made by `python tests/soak/attacks.py > docs/attacks.md`: commands of an attack on an early version, where `prune.yaml`
is a tiny pruning run. Tests hold every one of them ([reliability.md](reliability.md)); here is what a user reads.
D3, D5, D6, D9 and D11 (folders called like checkpoints, errors of other ranks, signals, full disks, what killed
processes leave) take more than a line: `end_to_end/test_truth.py`, `test_stopping.py` and `test_formats.py` do them.

| attack | command | answer |
|---|---|---|"""
REFERENCE = "models: [model]\nfolder: data\nsequence: 16\n"
ATTACKS: list[tuple[str, Callable[[Path], None] | None, str]] = [
    ("D1 a rate that diverges", None, f"train prune.yaml run=d1 {WILD.format('1e3')}"),
    ("D1 and one that ends in NaN", None, f"train prune.yaml run=d1 {WILD.format('1e12')}"),
    ("D1 a NaN weight in the source", nan_weight, "train prune.yaml run=d1"),
    ("D2 ids outside the vocabulary", strange_tokens, "train prune.yaml run=d2"),
    ("D4 two runs in a folder", held, MORE),
    ("D7 a bit of a checkpoint", flip("prune/checkpoints/*/*.safetensors"), MORE),
    ("D7 and extracted", flip("prune/checkpoints/*/*.safetensors"), "extract prune small"),
    ("D7 a digit of progress.json", flip("prune/checkpoints/*/progress.json"), MORE),
    ("D7 a bit of the data", flip("data/*/train/*.ds"), "verify data"),
    ("D7 a bit of an index", flip("data/*/train/*.index"), "train prune.yaml run=d7 data.verify=true"),
    ("D8 a bomb of aliases", write("bomb.yaml", BOMB), "train bomb.yaml"),
    ("D8 a long value", None, "train prune.yaml train.steps=" + "x" * 5000),
    ("D9 a damaged line of the log", write("prune/metrics.jsonl", "{\n{}\n"), "report prune"),
    ("D10 wrong types", edit("data/domains.json", set_("vocab", "many")), "train prune.yaml run=d10"),
    ("D10 a missing key", edit("data/domains.json", lambda all_: all_.pop("domains")), "train prune.yaml run=d10"),
    ("D10 deep nesting", write("data/domains.json", '{"a": ' + "[" * 99999), "train prune.yaml run=d10"),
    ("D10 progress.json", write("prune/checkpoints/step-00000002/progress.json", '{"step": "2"}'), "train prune.yaml"),
    ("D10 half a config in a run", write("prune/config.yaml", "run: [pru"), "train prune.yaml"),
    ("D10 a model that is a file", None, "train prune.yaml run=d10 model=prune.yaml"),
    ("D10 weights of domains", None, "train prune.yaml run=d10 'data.weights={colours: -1, trees: .nan}'"),
    ("D10 memories of 1 and 2", None, "train prune.yaml run=d10 optimizer.betas=[1,2]"),
    ("D10 no text", write("x.yaml", b"run: \xff\xfe"), "train x.yaml"),
    ("D12 pickled weights", pickled, "train prune.yaml run=d12"),
    ("D12 and measured", lambda world: (pickled(world), write("r.yaml", REFERENCE)(world))[1], "reference-loss r.yaml"),
    ("D13 layers", edit("model/config.json", set_("num_hidden_layers", 2**31)), "train prune.yaml run=d13"),
    ("D13 a pipe", lambda world: os.mkfifo(world / "pipe"), "train pipe"),
    ("D13 a line of a GB in a .gz of a MB", unfolding_line, "prepare bomb.yaml"),
    ("D14 the model's folder", None, "train prune.yaml run=model"),
    ("D14 the data's folder", None, "train prune.yaml run=data"),
    ("D14 no folder", None, "train prune.yaml run=''"),
    ("D14 among checkpoints", None, "extract prune prune/checkpoints/step-00000009"),
    ("D14 a run without its config", lambda world: (world / "prune" / "config.yaml").unlink(), "train prune.yaml"),
    ("D14 output in its source", write("p.yaml", "output: text/o\ntokenizer: model\ndomains: {a: {path: text}}\n"),
     "prepare p.yaml"),
    ("D15 NaN", write("model/config.json", '{"rms_norm_eps": NaN}'), "train prune.yaml run=d15"),
    ("D15 a shard elsewhere", edit("data/domains.json", lambda all_: shard(all_).update(file="/etc/passwd")),
     "train prune.yaml run=d15"),
    ("D15 and above", edit("data/domains.json", lambda all_: shard(all_).update(file="../../x.ds")), "verify data"),
]  # fmt: skip


def answer(world: Path, command: str) -> tuple[int, str]:
    """Exit status, and the lines of ours."""
    said = io.StringIO()
    arguments = shlex.split(command)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(arguments)
    text = said.getvalue()
    assert "Traceback" not in text, text
    ours = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("shear-tron ")]
    return status, "<br>".join(ours)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        good.mkdir()
        os.chdir(make_world(good))
        config = (good / "prune.yaml").read_text().replace(f"{good}/", "")
        (good / "prune.yaml").write_text(config)
        assert answer(good, "train prune.yaml train.steps=2 prune.warmup_steps=1")[0] == 0
        print(HEAD, flush=True)
        for number, (title, damage, command) in enumerate(ATTACKS):
            world = Path(place) / str(number)
            shutil.copytree(good, world)
            os.chdir(world)
            if damage is not None:
                damage(world)
            status, said = answer(world, command)
            assert status, (title, said)
            assert said, title
            assert "<br>" not in said, (title, said)  # one line
            shown = command if len(command) < 120 else command[:60] + "..."
            print(f"| {title} | `{shown}` | {said.replace('|', '/').replace(place, '')} |", flush=True)
            os.chdir(place)
            shutil.rmtree(world)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nAll of them in one process, whose memory never went beyond {peak:,.0f} MB.")


if __name__ == "__main__":
    main()
