"""How fast the data side is. Prints the four numbers that docs/data.md quotes.

    python examples/benchmarks/data.py [--tokenizer FOLDER] [--workers 2] [--only read,start,memory,prepare]

Needs no download: the text is the Python library's own source. Takes about two minutes on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEQUENCE = 4096
BATCH = 256  # sequences


def sparse_manifest(folder: Path, domains: int, shards: int, tokens: int) -> None:
    """A prepared folder of files that take no disk: every token is 0."""
    from shear_tron.data.manifest import Domain, Manifest, Shard

    found = {}
    for domain in range(domains):
        for split in ("train", "held_out"):
            (folder / f"d{domain}" / split).mkdir(parents=True, exist_ok=True)
        names = [f"d{domain}/train/{number:016x}.ds" for number in range(shards)]
        for name in names:
            (folder / name).touch()
            os.truncate(folder / name, 2 * tokens)
            np.array([tokens], dtype="<u8").tofile(folder / f"{name}.index")
        found[f"d{domain}"] = Domain(tuple(Shard(name, tokens, 1, "0" * 64) for name in names), ())
    Manifest(str(folder), "none", "0" * 64, 32000, 2, None, 0, 0.0, found).write()


def read() -> None:
    """Tokens a second of drawing and reading in one thread, and what a training step waits for."""
    from shear_tron.data.manifest import Manifest
    from shear_tron.data.sampler import Batches, Sampler

    with tempfile.TemporaryDirectory() as folder:
        sparse_manifest(Path(folder), 7, 4, 2_000_000)
        for shard in Path(folder).rglob("*.ds"):
            np.random.default_rng(0).integers(0, 32000, 2_000_000).astype("<u2").tofile(shard)  # real pages, no holes
        manifest = Manifest.read(folder)
        for sequence in (512, 2048, SEQUENCE):
            sampler = Sampler(manifest, list(manifest.domains), sequence, 0)
            rates = []
            for _ in range(9):
                start = time.perf_counter()
                draw = sampler.draw(BATCH, np.ones(7))
                sampler.read(draw)
                rates.append(BATCH * sequence / (time.perf_counter() - start))
            print(f"read: sequence {sequence}: {statistics.median(rates[1:]) / 1e6:.0f} million tokens/s")
        sampler = Sampler(manifest, list(manifest.domains), SEQUENCE, 0)
        rows = 16  # of one of 16 ranks
        batches = Batches(sampler, BATCH, 0, rows, np.ones(7))
        waits = []
        for _ in range(50):
            time.sleep(0.02)  # a step, during which the thread reads ahead
            start = time.perf_counter()
            batches.next()
            waits.append(time.perf_counter() - start)
        batches.close()
        wait, step = statistics.median(waits), rows * SEQUENCE / 50_000
        print(
            f"read: a rank's {rows} of {BATCH} sequences cost the training thread {wait * 1e3:.2f} ms, "
            f"{wait / step:.3%} of a step at 50,000 tokens/s a GPU"
        )


def start() -> None:
    """Start-up and resume with 10,000 shards, 10**12 tokens."""
    from shear_tron.data.manifest import Manifest
    from shear_tron.data.sampler import Batches, Sampler

    with tempfile.TemporaryDirectory() as folder:
        sparse_manifest(Path(folder), 10, 1000, 100_000_000)

        def begin(state: dict[str, object] | None) -> dict[str, object]:
            manifest = Manifest.read(folder)
            sampler = Sampler(manifest, list(manifest.domains), SEQUENCE, 0)
            if state:
                sampler.restore(state)
            batches = Batches(sampler, BATCH, 0, 16, np.ones(10))
            batches.next()
            batches.close()
            return batches.state()

        late = begin(None) | {"number": 2 * 10**8, "drawn": {f"d{number}": 2 * 10**7 for number in range(10)}}
        for title, state in (("start-up", None), ("resume at sample 200,000,000", late)):
            seconds = median_seconds(lambda state=state: begin(state))  # type: ignore[misc]
            print(f"start: {title} to the first batch, 10,000 shards, 10**12 tokens: {seconds:.2f} s")


def median_seconds(function: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def memory() -> None:
    """What the loader adds to a process that has imported torch, after reading everywhere in 10**12 tokens."""
    script = """
import sys
import torch
from shear_tron.data.manifest import Manifest
from shear_tron.data.sampler import Batches, Sampler
def resident():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
torch.zeros(1)
before = resident()
manifest = Manifest.read(sys.argv[1])
sampler = Sampler(manifest, list(manifest.domains), 4096, 0)
batches = Batches(sampler, 256, 0, 16, [1.0] * 10)
worst = 0.0
for _ in range(400):
    batches.next()
    worst = max(worst, resident())
batches.close()
print(worst - before)
"""
    with tempfile.TemporaryDirectory() as folder:
        for shards, tokens in ((10, 100_000), (1000, 100_000_000)):
            sparse_manifest(Path(folder), 10, shards, tokens)
            run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
            total = 10 * shards * tokens
            print(f"memory: loader over {total:.0e} tokens in {10 * shards:,} shards: {float(run.stdout):.0f} MB")


def corpus(folder: Path, files: int, megabytes: int) -> None:
    """The Python library's source as jsonl, in equal files."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    sources = [path for path in sources if "site-packages" not in path.parts]
    documents = [path.read_text(errors="replace") for path in sources]
    per_file = megabytes * 2**20 // files
    number = 0
    for file in range(files):
        size = 0
        with open(folder / f"{file}.jsonl", "w") as out:
            while size < per_file:
                size += out.write(json.dumps({"text": documents[number % len(documents)]}) + "\n")
                number += 1


def train_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    sources = [str(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train(sources, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def prepare_rate(tokenizer: str | None, workers: int, rounds: int = 3) -> None:
    """prepare and datatrove's own reader and tokenizer on the same files, taking turns."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    from shear_tron.data.prepare import DomainSource, PrepareConfig, prepare

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        (folder / "in").mkdir()
        corpus(folder / "in", files=4 * workers, megabytes=24 * workers)
        if tokenizer is None:
            train_tokenizer(folder)
        file = Path(tokenizer or folder)
        file = file / "tokenizer.json" if file.is_dir() else file
        seconds: dict[str, list[float]] = {"datatrove": [], "prepare": []}
        tokens = 0
        for number in range(rounds):
            logger.remove()
            pipeline = [
                JsonlReader(str(folder / "in")),
                DocumentTokenizer(
                    str(folder / f"bare{number}"), str(file), shuffle_documents=False, eos_token="<|endoftext|>"
                ),
            ]
            begin = time.perf_counter()
            executor = LocalPipelineExecutor(
                pipeline, tasks=4 * workers, workers=workers, logging_dir=str(folder / f"logs{number}")
            )
            with open(os.devnull, "w") as quiet:
                screen = os.dup(2)
                os.dup2(quiet.fileno(), 2)
                executor.run()
                os.dup2(screen, 2)
            seconds["datatrove"].append(time.perf_counter() - begin)
            config = PrepareConfig(
                output=str(folder / f"out{number}"),
                tokenizer=str(file),
                separator="<|endoftext|>",
                domains={"code": DomainSource(path=str(folder / "in"))},
                workers=workers,
            )
            begin = time.perf_counter()
            manifest = prepare(config)
            seconds["prepare"].append(time.perf_counter() - begin)
            tokens = manifest.domains["code"].tokens() + manifest.domains["code"].tokens("held_out")
        rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}
        for name, rate in rates.items():
            print(f"prepare: {name}: {rate / 1e3:,.0f} thousand tokens/s with {workers} workers ({tokens:,} tokens)")
        print(f"prepare: ratio {rates['prepare'] / rates['datatrove']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", help="folder or tokenizer.json with an <|endoftext|> token; default: trained here"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="read,start,memory,prepare")
    arguments = parser.parse_args()
    for part in arguments.only.split(","):
        if part == "prepare":
            prepare_rate(arguments.tokenizer, arguments.workers)
        else:
            {"read": read, "start": start, "memory": memory}[part]()


if __name__ == "__main__":
    main()
