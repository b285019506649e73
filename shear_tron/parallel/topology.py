"""Ranks and groups: the one owner of the process group and of the device mesh.

The mesh has the axes (pp, replicate, shard, tp). Data parallelism is replicate x shard: ranks along ``shard`` hold one
copy of the weights between them (FSDP), ranks along ``replicate`` hold copies. This is one of two files that read
environment variables: those that torchrun sets.
"""

import faulthandler
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shear_tron.architecture import Architecture
from shear_tron.config import ConfigError
from shear_tron.parallel.config import ParallelConfig
from shear_tron.params import Row, by_leaf, matrices
from shear_tron.shape import Shape, divisors, require_split


@dataclass(frozen=True)
class Layout:
    """How many ways each axis is cut; the product is the world size."""

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    tp: int = 1
    sequence: bool = True
    schedule: str = "1f1b"
    stages_per_rank: int = 1

    @property
    def dp(self) -> int:
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    @staticmethod
    def plan(config: ParallelConfig, shape: Shape, world: int) -> "Layout":
        """The layout of ``config`` on ``world`` ranks for a model of ``shape``. ValueError where numbers do not fit."""
        for name in ("kv_heads", "ffn", "vocab"):  # what tensor parallelism cuts, the scarcest first
            require_split(name, getattr(shape, name), "tp", config.tp)
        stages = config.pp * config.stages_per_rank
        if stages > shape.layers:
            raise ConfigError(
                f"parallel.pp * stages={stages} is more than the model's layers={shape.layers}; use at most "
                f"{shape.layers}, a layer for each stage"
            )
        model_ranks = config.pp * config.tp
        if world % model_ranks or (config.dp and config.dp * model_ranks != world):
            dp = config.dp or "N"
            raise ConfigError(
                f"world size {world} does not match parallel: pp={config.pp} x dp={dp} x tp={config.tp}; "
                f"start {model_ranks * (config.dp or max(1, world // model_ranks))} processes, or change parallel"
            )
        dp = world // model_ranks
        shard = dp if config.shard is None else config.shard
        if dp % shard:
            raise ConfigError(f"parallel.shard={shard} does not divide dp={dp}; use one of {divisors(dp)}")
        return Layout(
            config.pp, dp // shard, shard, config.tp, config.sequence, config.schedule, config.stages_per_rank
        )

    def require_batch(self, batch: int, micro_batch: int, sequence: int) -> None:
        """Raise ValueError unless a batch divides over the layout."""
        require_split("batch / micro_batch", batch // micro_batch, "dp", self.dp)
        if self.sequence:
            require_split("micro_batch * sequence", micro_batch * sequence, "tp", self.tp)
        microbatches = batch // micro_batch // self.dp
        if self.schedule == "interleaved" and microbatches % self.pp:
            raise ConfigError(
                f"{microbatches} microbatches per data-parallel rank are no multiple of pp={self.pp}, which the "
                f"interleaved schedule needs; use train.batch={micro_batch * self.dp * self.pp} times a whole number"
            )
        if microbatches < self.pp:
            raise ConfigError(
                f"{microbatches} microbatches per data-parallel rank leave pp={self.pp} stages idle; use "
                f"train.batch >= {micro_batch * self.dp * self.pp}"
            )

    def layers(self, stage: int, architecture: Architecture) -> range:
        """The layers of pipeline stage ``stage`` of pp * stages_per_rank: runs that make the slowest stage as fast as
        can be, where the last one has the output head to compute as well (the embedding is a look-up)."""
        stages = self.pp * self.stages_per_rank
        last = _last_stage(architecture, stages)
        before, others = architecture.shape.layers - last, stages - 1
        # Of the others the first have fewer, since they hold more microbatches at once.
        start, stop = (before if place > others else place * before // max(1, others) for place in (stage, stage + 1))
        return range(start, architecture.shape.layers if stage == others else stop)

    def stages(self, pp_rank: int) -> list[int]:
        """The stages that a pipeline rank holds: every pp-th one."""
        return [pp_rank + turn * self.pp for turn in range(self.stages_per_rank)]


@cache
def _last_stage(architecture: Architecture, stages: int) -> int:
    """How many layers the last of ``stages`` has: the most among those that are best for the slowest stage."""
    if stages == 1:
        return architecture.shape.layers
    layers, table = architecture.shape.layers, by_leaf(architecture)

    def products(*rows: Row) -> int:
        return sum(prod(row.size(architecture.shape)) for row in rows)

    head = products(table["embed"]) / products(*matrices(architecture))  # in layers

    def slowest(last: int) -> float:
        return max(-(-(layers - last) // (stages - 1)), last + head)

    return min(range(max(1, layers - stages + 1), 0, -1), key=slowest)


@dataclass(frozen=True)
class Topology:
    """A layout with its process groups, as seen from this rank."""

    layout: Layout
    mesh: DeviceMesh
    device: torch.device

    @property
    def pp_rank(self) -> int:
        return self.mesh.get_local_rank("pp")

    @property
    def dp_rank(self) -> int:
        return self.mesh.get_local_rank("replicate") * self.layout.shard + self.mesh.get_local_rank("shard")

    @property
    def tp_rank(self) -> int:
        return self.mesh.get_local_rank("tp")

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """Where FSDP shards, and replicates if there is more than one copy."""
        return self.mesh["replicate", "shard"] if self.layout.replicate > 1 else self.mesh["shard"]

    @cached_property
    def tied_embedding_group(self) -> dist.ProcessGroup | None:
        """The first and last pipeline rank of this rank's column, or None where this rank is neither or both."""
        if self.layout.pp == 1:
            return None
        mine = None
        ranks = self.mesh.mesh.flatten(1)  # [pp, other axes]
        for column in range(ranks.shape[1]):
            pair = [int(ranks[0, column]), int(ranks[-1, column])]
            group = dist.new_group(pair)
            if dist.get_rank() in pair:
                mine = group
        return mine


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among all; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process to speak for all, before or without a process group."""
    return os.environ.get("RANK", "0") == "0"


def choose_device(wanted: str) -> torch.device:
    """The device of ``wanted``: "auto", "cpu" or "cuda"; ConfigError where CUDA is wanted and there is none."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but no CUDA device is visible; use device=auto or cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start(layout: Layout, device: torch.device, timeout_seconds: int = 600) -> Topology:
    """Join the ranks. Under torchrun by its environment, alone without it; a process group already there is used."""
    if sys.__stderr__:
        faulthandler.enable(sys.__stderr__)  # a rank that dies in native code says where it was
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that the flight recorder remembers
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)  # a rank that dies must not leave its peers waiting for ever
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    mesh = init_device_mesh(
        device.type,
        (layout.pp, layout.replicate, layout.shard, layout.tp),
        mesh_dim_names=("pp", "replicate", "shard", "tp"),
    )
    return Topology(layout, mesh, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
