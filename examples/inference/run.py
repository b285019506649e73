"""How fast source, sheared and unevenly pruned models generate: why shearing keeps every layer the same.

    python examples/smollm2/fetch_model.py models/SmolLM2-135M
    python examples/inference/run.py models/SmolLM2-135M       # appends rows to examples/inference/rows.csv

The uneven model has as many parameters as the sheared one, but layers of all sizes, as pruning without a target leaves
them (the paper's comparison with CoFiPruning). Speed depends on sizes alone, so all have random weights. transformers
generates with all three, llama.cpp (where llama-cpp-python is installed) with those whose layers are of one size, as
our GGUF files have them. Greedy, with a KV cache; models take turns, and a time is of the prompt and all new tokens.
"""

import argparse
import csv
import datetime
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from shear_tron.architecture import Architecture
from shear_tron.checkpoint.huggingface import architecture_config
from shear_tron.checkpoint.model_folder import Form, read_architecture, write_model
from shear_tron.params import count, params

ROWS = Path(__file__).with_name("rows.csv")
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama-cpp-python"}
Generate = Callable[[int], None]  # of so many new tokens


def random_network(architecture: Architecture, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**architecture_config(architecture, dtype))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def uneven_sizes(architecture: Architecture, seed: int = 0) -> list[tuple[int, int]]:
    """(key-value groups, ffn) of each layer, from a fourth to seven fourths of the even ones, of the same sums."""
    shape, draw = architecture.shape, random.Random(seed)

    def spread(even: int, step: int) -> list[int]:
        units, layers = even // step, shape.layers
        sizes = [max(1, round(units * draw.uniform(0.25, 1.75))) for _ in range(layers)]
        while sum(sizes) != units * layers:
            place = draw.randrange(layers)
            change = 1 if sum(sizes) < units * layers else -1
            sizes[place] = max(1, sizes[place] + change)
        return [size * step for size in sizes]

    return list(zip(spread(shape.kv_heads, 1), spread(shape.ffn, 8 if shape.ffn % 8 == 0 else 1), strict=True))


def uneven_network(architecture: Architecture, dtype: torch.dtype) -> Any:
    """As many parameters as a network of ``architecture``, in layers of different sizes."""
    network, shape = random_network(architecture, dtype), architecture.shape
    for layer, (groups, ffn) in zip(network.model.layers, uneven_sizes(architecture), strict=True):
        queries = groups * shape.heads_per_group * shape.head_dim
        for name, inside, outside in (
            ("q_proj", shape.hidden, queries),
            ("k_proj", shape.hidden, groups * shape.head_dim),
            ("v_proj", shape.hidden, groups * shape.head_dim),
            ("o_proj", queries, shape.hidden),
        ):
            setattr(layer.self_attn, name, nn.Linear(inside, outside, bias=False, dtype=dtype))
        layer.mlp.gate_proj = nn.Linear(shape.hidden, ffn, bias=False, dtype=dtype)
        layer.mlp.up_proj = nn.Linear(shape.hidden, ffn, bias=False, dtype=dtype)
        layer.mlp.down_proj = nn.Linear(ffn, shape.hidden, bias=False, dtype=dtype)
    return network


def by_transformers(network: Any, prompt: int, batch: int, device: str) -> Generate:
    network = network.to(device)
    ids = torch.arange(3, 3 + prompt, device=device).repeat(batch, 1)
    mask = torch.ones_like(ids)
    network.generation_config.eos_token_id = None

    def generate(tokens: int) -> None:
        with torch.inference_mode():
            out = network.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        assert out.shape[1] == prompt + tokens
        if device == "cuda":
            torch.cuda.synchronize()

    return generate


def by_llama_cpp(file: Path, prompt: int, tokens: int, threads: int) -> Generate:
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=prompt + tokens + 8, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(tokens: int) -> None:
        model.reset()
        stream = model.generate(list(range(3, 3 + prompt)), temp=0.0, repeat_penalty=1.0)
        for _ in range(tokens):
            next(stream)

    return generate


def random_tensors(architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    noise = torch.Generator().manual_seed(0)
    return ((p.name, 0.02 * torch.randn(p.size, generator=noise)) for p in params(architecture))


def models(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, int, Generate]]:
    """(engine, model, parameters, what generates)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = read_architecture(given.source)
    sizes = {key: int(size) for key, size in (part.split("=") for part in given.target.split(","))}
    target = source.resized(replace(source.shape, **sizes))
    for name, architecture, network in (
        ("source", source, random_network(source, dtype)),
        ("sheared", target, random_network(target, dtype)),
        ("uneven", target, uneven_network(target, dtype)),
    ):
        found = network.num_parameters()
        if found != count(architecture):
            raise ValueError(f"{name} has {found:,} parameters instead of {count(architecture):,}")
        yield "transformers", name, found, by_transformers(network, given.prompt, given.batch, device)
    if given.batch > 1 or not given.llama_cpp:
        return
    for name, architecture in (("source", source), ("sheared", target)):
        file = folder / f"{name}.gguf"
        write_model(file, architecture, random_tensors(architecture), Form("gguf", "float32"), given.source)
        threads = torch.get_num_threads()
        yield "llama.cpp", name, count(architecture), by_llama_cpp(file, given.prompt, given.tokens, threads)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a LLaMA with its tokenizer")
    parser.add_argument(
        "--target", default="layers=25,ffn=1152", help="sizes of the sheared model; default: make demo's"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (llama.cpp: 1 only)")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="new ones of each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-llama-cpp", dest="llama_cpp", action="store_false")
    parser.add_argument("--rows", type=Path, default=ROWS)
    given = parser.parse_args(argv)
    if given.llama_cpp:
        try:
            import llama_cpp  # noqa: F401
        except ImportError:
            print("llama.cpp is left out: pip install '.[llama-cpp]'")
            given.llama_cpp = False
    with TemporaryDirectory() as folder:
        every = list(models(given, Path(folder)))
        seconds: dict[tuple[str, str], list[float]] = {each[:2]: [] for each in every}
        for turn in range(given.rounds + 1):
            for engine, name, _, generate in every:
                began = time.perf_counter()
                generate(given.tokens)
                if turn:  # the first warms up
                    seconds[engine, name].append(time.perf_counter() - began)
    rows = [_row(given, *each[:3], seconds[each[:2]]) for each in every]
    is_new = not given.rows.exists()
    with open(given.rows, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['engine']:13} {row['model']:8} {row['parameters']:>12,} {row['tokens_per_second']:>9} tokens/s")


def _row(given: argparse.Namespace, engine: str, name: str, parameters: int, seconds: list[float]) -> dict[str, Any]:
    git = ["git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROWS.parent)
    rates = [given.batch * given.tokens / each for each in seconds]
    return {
        "engine": engine, "version": version(PACKAGES[engine]), "model": name, "parameters": parameters,
        "batch": given.batch, "prompt": given.prompt, "tokens": given.tokens,
        "tokens_per_second": round(statistics.median(rates), 2), "slowest": round(min(rates), 2),
        "fastest": round(max(rates), 2), "rounds": len(rates),
        "target": given.target.replace(",", " "),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
