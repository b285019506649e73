"""Benchmark of the masked ops: ``python kernels/bench/run.py``, ``shear-tron bench`` or ``make bench``.

On a CUDA device: every op at every shape of ``shapes.py``, checked against its definition first, then timed against its
rivals; rows are appended to results.csv and drawn to one PNG per op. Without one: the roofline of every row and the
table of the compiled kernels, and a line that says so.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # works without installation
from shapes import TOKENS, Problem, problems  # noqa: E402
from shear_kernels import roofline  # noqa: E402

HERE = Path(__file__).parent
REPEATS = 30


@dataclass(frozen=True)
class Result:
    """One rival at one shape, forward or backward. Times in milliseconds, memory in MiB."""

    op: str
    model: str
    sequence: int
    closed: float
    rival: str
    direction: str
    median_ms: float
    spread_ms: float  # between the quartiles
    tflops: float  # of the least work, so comparable between rivals
    gigabytes_per_second: float  # of the least bytes, likewise
    roofline_share: float  # least time at the copy bandwidth measured in this run and the maker's FLOP/s, over median
    peak_mib: float
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str


def commit() -> str:
    """Short commit of this checkout, "unknown" outside one."""
    found = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def time_cuda(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and quartile distance in seconds of ``run``, each after a flushed cache."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for repeat in range(repeats + 3):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.median(times), high - low


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second read and written by a copy of 1 GiB: what a memory-bound kernel can hope for on this device."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    seconds, _ = time_cuda(lambda: target.copy_(source), repeats)
    return 2 * 2**30 / seconds


def gradients(op: Callable[..., Any], tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, then gradients of all inputs under an upstream of ones."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])]


def check(small: Problem, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The kernel's largest error against float64 is at most twice the definition's, for outputs and all gradients.

    Gates closed to 0 are left out of the comparison: their gradient is 0 in the kernel by its contract.
    """
    torch.manual_seed(0)
    tensors = small.inputs(device, dtype)
    ours, plain = gradients(small.rivals["kernel"], tensors), gradients(small.definition, tensors)
    exact = gradients(small.definition, {name: t.double() for name, t in tensors.items()})
    names = [f"output {i}" for i in range(len(exact) - len(tensors))] + [f"d({name})" for name in tensors]
    for name, mine, theirs, truth in zip(names, ours, plain, exact, strict=True):
        if name in ("d(mask)", "d(head_mask)", "d(hidden_mask)", "d(layer_gate)"):
            kept = tensors[name[2:-1]] != 0
            mine, theirs, truth = mine[kept], theirs[kept], truth[kept]
            if truth.numel() < 8:  # too few numbers for their largest error to mean much
                continue
        error, allowed = (mine - truth).abs().max(), 2 * (theirs - truth).abs().max() + truth.abs().max() / 2**20
        if not error <= allowed:
            raise ValueError(
                f"{small.op} {small.model}: {name} errs by {error:.3g}, more than {allowed:.3g}; fix the kernel"
            )


def measure(problem: Problem, device: roofline.Device, repeats: int) -> list[Result]:
    """Forward and backward of every rival; a rival that this machine cannot run is named and left out."""
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    about |= {"triton": __import__("triton").__version__, "date": datetime.date.today().isoformat()}
    tensors = {n: t.requires_grad_() for n, t in problem.inputs("cuda", torch.bfloat16).items()}
    results = []
    for name, rival in problem.rivals.items():
        try:
            timings = time_rival(rival, tensors, repeats)
        except Exception as error:  # a rival is other people's code: whatever it raises, the others still run
            print(f"  {name}: cannot run here: {str(error).splitlines()[0][:100]}")
            continue
        for direction, work, (median, spread, peak) in zip(("forward", "backward"), problem.work, timings, strict=True):
            results.append(
                Result(
                    problem.op, problem.model, problem.sequence, problem.closed, name, direction,
                    round(median * 1e3, 4), round(spread * 1e3, 4), round(work.flops / median / 1e12, 1),
                    round(work.bytes / median / 1e9, 1), round(device.seconds(work) / median, 3), round(peak, 1),
                    **about,
                )
            )  # fmt: skip
    return results


def calls(
    rival: Callable[..., Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and a backward of outputs made here; each allocates what the rival allocates, and nothing beside it."""
    outputs = rival(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.ones_like(o) for o in outputs]
    inputs = list(tensors.values())
    return partial(rival, **tensors), partial(
        torch.autograd.grad, outputs, inputs, upstream, retain_graph=True, allow_unused=True
    )


def captured(call: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], Any]:
    """``call`` as a CUDA graph, so that the GPU is timed and not the host; itself where it cannot be captured."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError as error:  # it waits for the host on its way
        print(f"  no CUDA graph, timed from the host: {str(error).splitlines()[0][:80]}")
        torch.cuda.synchronize()
        return call
    return graph.replay


def time_rival(
    rival: Callable[..., Any], tensors: Mapping[str, torch.Tensor], repeats: int
) -> list[tuple[float, float, float]]:
    """(median, spread, peak MiB above the inputs) of forward and of backward."""
    timings = []
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    base = torch.cuda.memory_allocated()
    with torch.cuda.stream(stream):  # a backward runs where its forward ran, and a graph has a stream of its own
        for call in calls(rival, tensors):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            call()
            peak = (torch.cuda.max_memory_allocated() - base) / 2**20
            timings.append((*time_cuda(captured(call, stream), repeats), peak))
    torch.cuda.current_stream().wait_stream(stream)
    return timings


def append(path: Path, results: Iterable[Result]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(asdict(r) for r in results)


def print_roofline(chosen: Sequence[Problem]) -> None:
    """Least milliseconds, forward / backward, on every device of the table."""
    print("Least time in ms, forward / backward, by bytes and FLOPs alone (bf16)")
    print(f"{'op':18}{'model':13}{'sequence':>9}{'closed':>8}" + "".join(f"{d.name:>18}" for d in roofline.DEVICES))
    for p in chosen:
        cells = (f"{d.seconds(p.work[0]) * 1e3:.3f} / {d.seconds(p.work[1]) * 1e3:.3f}" for d in roofline.DEVICES)
        print(f"{p.op:18}{p.model:13}{p.sequence:9}{p.closed:8.0%}" + "".join(f"{c:>18}" for c in cells))


def print_compiled(table: Path) -> None:
    """The committed table of the compiler's output, aligned, without hashes."""
    with table.open(newline="") as file:
        lines = [line[:-2] for line in csv.reader(file)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\nCompiled ahead of time (python -m shear_kernels.aot)")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_choice(results: Sequence[Result]) -> None:
    """What this run says of ``dense_attention.MEASURED``: the fastest attention, gated and not, with all heads open,
    among the rivals that ran in every row."""
    for gated in (True, False):
        times: dict[str, dict[tuple[str, int, str], float]] = {}
        for r in results:
            takes_gate = r.rival == "kernel" or r.rival.endswith("+ multiply")
            plain = r.rival == "kernel, no gate" or r.rival.endswith(", gate folded into o")
            if r.op == "masked_attention" and r.closed == 0 and (takes_gate if gated else plain):
                times.setdefault(r.rival, {})[r.model, r.sequence, r.direction] = r.median_ms
        rows = set().union(*times.values())
        total = {rival: sum(ms.values()) for rival, ms in times.items() if ms.keys() == rows}
        if total:
            name = min(total, key=lambda rival: total[rival])
            backend = "triton" if name.startswith("kernel") else name.split(",")[0].removesuffix(" + multiply")
            print(f'for dense_attention.MEASURED: ("{results[0].gpu}", {gated}): "{backend}",')


def run_on_gpu(chosen: Sequence[tuple[Problem, Problem]], options: argparse.Namespace) -> None:
    bandwidth, name = copy_bandwidth(options.repeats), torch.cuda.get_device_name()
    flops = next((d.flops for d in roofline.DEVICES if d.name.split()[0] in name), roofline.H100.flops)
    device = roofline.Device(name, flops, bandwidth)
    print(f"{name}: copy bandwidth {bandwidth / 1e9:.0f} GB/s, matrix rate taken as {flops / 1e12:.0f} TFLOP/s")
    measured: list[Result] = []
    for problem, small in chosen:
        print(f"{problem.op} {problem.model} sequence {problem.sequence} closed {problem.closed:.0%}", flush=True)
        check(small, "cuda")
        results = measure(problem, device, options.repeats)
        append(options.results, results)
        measured += results
        for r in results:
            print(
                f"  {r.rival:26}{r.direction:9}{r.median_ms:9.3f} ms +- {r.spread_ms:.3f}{r.tflops:8.0f} TFLOP/s"
                f"{r.gigabytes_per_second:8.0f} GB/s{r.roofline_share:7.0%} of roofline{r.peak_mib:9.0f} MiB",
                flush=True,
            )
    print_choice(measured)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.split("\n")[0])
    parser.add_argument("--op", default="", metavar="TEXT", help="only ops whose name contains TEXT")
    parser.add_argument("--model", default="", metavar="TEXT", help="only model shapes whose name contains TEXT")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens per microbatch (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed runs of each row (default %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results.csv", help="CSV to append to")
    options = parser.parse_args(argv)
    chosen = [pair for pair in problems(options.tokens) if options.op in pair[0].op and options.model in pair[0].model]
    if not chosen:
        raise ValueError(f"no row has op {options.op!r} and model {options.model!r}; run without them to see all")
    if torch.cuda.is_available():
        run_on_gpu(chosen, options)
    else:
        print_roofline([problem for problem, _ in chosen])
        if (HERE / "aot.csv").exists():
            print_compiled(HERE / "aot.csv")
        print("No CUDA device here: nothing was measured. The rooflines are arithmetic, the table is the compiler's.")
    if options.results.exists():
        from plot import draw

        draw(options.results, HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
