"""What a step costs the host: milliseconds of CPU time a layer to issue forward and backward, where the arithmetic is
nothing.

    python examples/benchmarks/host_time.py [--rounds 20] [--layers 16]

A LLaMA of hidden 64 on 16 tokens in one process: nearly all time is Python, autograd and FSDP, and on a GPU the same
work must be done ahead of the kernels. Dense, masked and compact steps in turn, gates closed but for whole layers', the
least time of each: process time, so that other programs disturb little. A layer costs what more layers cost more.
"""

import argparse
import gc
import time

import pruning_step
import torch
from pruning_step import KINDS, Random

from shear_tron.architecture import Architecture
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import Engine, build_stages
from shear_tron.parallel.topology import Layout, Topology, start
from shear_tron.pruning.gates import LIMIT
from shear_tron.shape import Shape
from shear_tron.train.pruner import Pruner


def steps(layers: int, topology: Topology, rounds: int) -> dict[str, float]:
    """The least milliseconds of a step by kind: drawing masks, forward, backward, and gates' gradients to the host."""
    shape = Shape(hidden=64, layers=layers, heads=4, kv_heads=4, head_dim=16, ffn=176, vocab=64)
    stages = build_stages(Architecture(shape), topology, "none")
    stages = [shard(stage, Random(shape), topology, torch.float32, torch.float32) for stage in stages]
    engine = Engine(stages, topology, 1, 1, 16, torch.float32)
    windows = torch.randint(shape.vocab, (1, 17), generator=torch.Generator().manual_seed(2))
    pruners: dict[str, Pruner | None] = {"dense": None}
    for kind in KINDS[1:]:
        by = pruners[kind] = pruning_step.pruner(kind, 1.0, shape, topology)
        by.method.gates.logits["layers"].data.fill_(LIMIT)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind, by in pruners.items():
            began = time.process_time()
            drawn = by.sample(number, range(1)) if by else None
            engine.train(windows[:, :-1], windows[:, 1:], drawn)
            if drawn:
                drawn.gradients()
            found[kind].append((time.process_time() - began) * 1e3)
            stages[0].zero_grad()
    return {kind: min(times) for kind, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()
    topology = start(Layout(), torch.device("cpu"))
    few, many = (steps(layers, topology, arguments.rounds) for layers in (arguments.layers // 4, arguments.layers))
    more = arguments.layers - arguments.layers // 4
    print("ms of the host: a layer, and a step beside its layers")
    for kind in KINDS:
        layer = (many[kind] - few[kind]) / more
        print(f"{kind:8} {layer:6.2f} {many[kind] - arguments.layers * layer:8.2f}")


if __name__ == "__main__":
    main()
