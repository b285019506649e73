"""What no config holds about a run: when, by which software, on what, of what size; for its log."""

import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from shear_kernels import roofline

from shear_tron.parallel.topology import Topology
from shear_tron.params import count
from shear_tron.train.metrics import Log
from shear_tron.train.plan import Plan


def facts(plan: Plan, topology: Topology, compute: torch.dtype) -> dict[str, Any]:
    """The record that opens a run's log. JSON's types only."""
    shape, target, device = plan.architecture.shape, plan.target, topology.device
    return {
        "time": time.time(),
        "stage": "pruning" if target else "training",
        "steps": plan.config.train.steps,
        "versions": {"shear-tron": _version(), "torch": torch.__version__, "python": platform.python_version()},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "compute": str(compute).removeprefix("torch."),
        "ranks": topology.layout.world,
        "layout": asdict(topology.layout),
        "shape": asdict(shape),
        "parameters": count(plan.architecture),
        "target": target and asdict(target),
        "target_parameters": target and count(plan.architecture.resized(target)),
    }


def open_log(log: Log, step: int, resumed: bool, plan: Plan, topology: Topology, compute: torch.dtype) -> None:
    """Write what runs where, and say it in a line or two."""
    found, config = facts(plan, topology, compute), plan.config
    log.write({"run": {"from_step": step} | found})
    size = f"{found['parameters']:,}" + (f" -> {found['target_parameters']:,}" if found["target"] else "")
    tokens = config.train.steps * config.train.batch * config.data.sequence
    layout = topology.layout
    ranks = "1 rank" if layout.world == 1 else f"{layout.world} ranks"
    log.say(
        f"{found['stage']} {size} parameters: {config.train.steps:,} steps, {tokens:,} tokens, on {ranks} "
        f"(pp {layout.pp} x dp {layout.dp} x tp {layout.tp}) of {found['device']}, {found['compute']}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    )
    if resumed:
        log.say(f"going on from step {step} of {config.run}")


def spent(
    flops: float, tokens: int, seconds: float, waited: float, topology: Topology, peak: float | None
) -> dict[str, Any]:
    """What a step took, for its log line. flops, tokens: of all ranks; waited: seconds, of them, for its batch."""
    rate = flops / seconds / topology.layout.world
    return {
        "seconds": seconds,
        "data_seconds": waited,
        "tokens_per_second": tokens / seconds,
        "tflops_per_rank": rate / 1e12,  # docs/report.md says what counts
        "mfu": rate / peak if peak else None,
        "peak_memory": peak_memory(topology.device),  # bytes, of this rank
        "time": time.time(),  # seconds since 1970
    }


def data_sheet(device: torch.device, given: float | None) -> float | None:
    """FLOP/s of dense 16-bit products, what MFU is a share of: ``given`` in TFLOP/s, or of a known GPU; else None."""
    if given is not None:
        return given * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((each.flops for each in roofline.DEVICES if each.name.split()[0] in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes this process has had in use at most: of the GPU's memory, as torch allocated it, or of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version() -> str:
    try:
        return version("shear-tron")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _commit() -> str | None:
    """The commit of the checkout this code runs from, with a + where files differ from it; None outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
