"""How fast models are converted, beside `cp`, and in how much memory.

    python examples/benchmarks/formats.py OUT                 # rows for a 1.3B shape in bfloat16 (2.7 GB a folder)
    python examples/benchmarks/formats.py OUT --sparse        # weights that are holes: the memory that a 7B takes

Rows are printed, and appended to formats.csv beside this file (or to --rows).
Each conversion runs in a process of its own, whose peak resident memory is told. Megabytes are those of the weights
that are read (bfloat16; of a run's checkpoint, float32). Files are read from the page cache where they fit; the disk is
waited for only where the writer waits for it: `cp` does not, ours do. The target is 200 MB/s or 0.8 times `cp`,
whichever is lower; of a 7B made of holes, 3 GB.
"""

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import append
from torch import Tensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import huggingface, sharded
from shear_tron.checkpoint.model_folder import Form, open_model, write_model
from shear_tron.checkpoint.safetensors_stream import Writer
from shear_tron.config import save
from shear_tron.files import sha256
from shear_tron.params import count, params
from shear_tron.shape import Shape
from shear_tron.train.config import RunConfig
from shear_tron.train.outputs import export
from shear_tron.train.run_folder import CONFIG, RunFolder

ROWS = Path(__file__).with_name("formats.csv")
SHAPES = {
    "tiny": Shape(hidden=64, layers=2, heads=4, kv_heads=4, head_dim=16, ffn=96, vocab=320),
    "1.3b": Shape(hidden=2048, layers=24, heads=16, kv_heads=16, head_dim=128, ffn=5504, vocab=32000),
    "7b": Shape(hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000),
}
VOCABULARY = {chr(97 + i // 26) + chr(97 + i % 26): i for i in range(300)}


def random_tensors(architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    noise = torch.randn(1 << 20).to(torch.bfloat16)
    for param in params(architecture):
        number = torch.Size(param.size).numel()
        yield param.name, noise.repeat(-(-number // len(noise)))[:number].view(param.size)


def make(folder: Path, architecture: Architecture, sparse: bool) -> None:
    """A Hugging Face folder with a tokenizer; ``sparse``: the files are as long as they would be, and hold holes."""
    words = folder / "words"
    words.mkdir(parents=True)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": VOCABULARY, "merges": []},
    }
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    if sparse:
        shutil.copytree(words, folder / "hf")
        config = huggingface.architecture_config(architecture, torch.bfloat16)
        (folder / "hf/config.json").write_text(json.dumps(config))
        names = huggingface.family_of(architecture).names
        sizes = {str(names[p.row.leaf]).format(p.layer): p.size for p in params(architecture)}
        Writer(folder / "hf", sizes, torch.bfloat16, 5e9)
    else:
        huggingface.write(folder / "hf", architecture, random_tensors(architecture), tokenizer_from=words)
    make_run(folder / "run", folder / "hf", architecture, sparse)


def make_run(run: Path, model: Path, architecture: Architecture, sparse: bool) -> None:
    """A run of one step. Its checkpoint holds float32 weights and no moments, which an export never reads."""
    checkpoint = sharded.path(run, 1)
    checkpoint.mkdir(parents=True)
    writer = Writer(checkpoint, {p.name: p.size for p in params(architecture)}, torch.float32, 5e9)
    if not sparse:
        for name, tensor in random_tensors(architecture):
            writer.write(name, tensor)
        writer.close()
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in checkpoint.glob("*.safetensors")
    }
    (checkpoint / sharded.PROGRESS).write_text(sharded.sealed({"step": 1, "files": files, "state": {}}))
    config = {"data": {"folder": "none", "sequence": 16}, "train": {"steps": 1, "batch": 1}}
    save(RunConfig.model_validate({"run": str(run), "model": str(model), **config}), run / CONFIG)


def convert(source: Path, output: Path, form: str) -> None:
    """In a process of its own: read ``source``, write ``output``, print seconds, those of the CPU, and peak memory."""
    began, busy = time.perf_counter(), time.process_time()
    if form == "cp":
        shutil.copytree(source, output)
    elif form == "export":
        export(RunFolder.open(source), str(output), Form("huggingface", "bfloat16"))
    else:
        model = open_model(source)
        tensors = ((name, model.read(name)) for name in model.names())
        how = Form(form, "bfloat16")  # type: ignore[arg-type]
        write_model(output, model.architecture, tensors, how, source.parent / "hf")
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = time.process_time() - busy
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak": used.ru_maxrss * 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for scratch; must not exist")
    parser.add_argument("--shape", choices=SHAPES, default=None)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--one", nargs=2, metavar=("output", "form"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        convert(given.out, Path(given.one[0]), given.one[1])
        return
    architecture = Architecture(SHAPES[given.shape or ("7b" if given.sparse else "1.3b")])
    make(given.out, architecture, given.sparse)
    wanted = 200.0
    for source, output, form in [
        ("hf", "copy", "cp"),
        ("hf", "back", "huggingface"),
        ("hf", "nanotron", "nanotron"),
        ("nanotron", "again", "huggingface"),
        ("hf", "model.gguf", "gguf"),
        ("run", "final", "export"),
    ]:
        call = [sys.executable, __file__, str(given.out / source), "--one", str(given.out / output), form]
        told = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        megabytes = (4 if source == "run" else 2) * count(architecture) / 1e6
        speed, peak = megabytes / told["seconds"], told["peak"] / 1e9
        if form == "cp":
            wanted, target, met = min(wanted, 0.8 * speed), "", ""
        elif given.sparse:
            target, met = "3 GB", "yes" if peak < 3 else "no"
        else:
            target, met = f"{wanted:.0f} MB/s", "yes" if speed >= wanted else "no"
        row = {
            "from": source, "to": form, "megabytes": round(megabytes, 1), "seconds": round(told["seconds"], 2),
            "cpu_seconds": round(told["cpu_seconds"], 2), "megabytes_per_second": round(speed),
            "peak_memory_gb": round(peak, 2), "target": target, "met": met,
            "weights": "holes" if given.sparse else "random", "device": _processor(),
        }  # fmt: skip
        append(given.rows, row)
        if output != "nanotron":
            path = given.out / output
            path.unlink() if path.is_file() else shutil.rmtree(path)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
