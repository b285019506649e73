"""Law 5: saved in one layout and loaded in another is never saved: every tensor is the same, to the bit."""

import os
import resource
import shutil
import time
import tracemalloc
from contextlib import closing
from math import prod
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, InMemory
from ranks import run
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.checkpointer import Checkpointer
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import build_stages
from shear_tron.parallel.topology import Layout, Topology, start
from shear_tron.params import params
from shear_tron.train.pruner import moments, start_moments

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2, schedule="interleaved", stages_per_rank=2),
    "fsdp3": Layout(shard=3),  # 40, 20 and 8 rows over 3 ranks: uneven
    "dp2 x tp2": Layout(replicate=2, tp=2),
    "fsdp2 x tp2 x pp2": Layout(shard=2, tp=2, pp=2),
}

PAIRED = ("llama", "llama, tied")  # checked from every layout to every other


def numbered(architecture: Architecture, scale: float) -> InMemory:
    """Weights that anyone can recompute: different in every entry of every tensor."""
    return InMemory(
        {
            param.name: (torch.arange(prod(param.size)).view(param.size) + 1000 * place) * scale
            for place, param in enumerate(params(architecture))
        }
    )


def tensors(topology: Topology, architecture: Architecture, scale: float) -> dict[str, Tensor]:
    """What a trainer checkpoints: weights, Adam's moments, and a tensor that every rank has."""
    stages = [
        shard(stage, numbered(architecture, scale), topology, torch.float32, torch.float32)
        for stage in build_stages(architecture, topology, "none")
    ]
    parameters: dict[str, nn.Parameter] = {n: p for stage in stages for n, p in stage.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values())
    start_moments(optimizer, 3)
    with torch.no_grad():
        for parameter in parameters.values():
            optimizer.state[parameter]["exp_avg"].add_(parameter, alpha=2)
            optimizer.state[parameter]["exp_avg_sq"].add_(parameter, alpha=3)
    found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    return found | moments(optimizer, parameters) | {"gates.ffn": torch.arange(7.0) * scale}


def save(layout: Layout, folder: str) -> None:
    """A run with one checkpoint for each architecture; every other one is written in the background."""
    topology = start(layout, torch.device("cpu"))
    for place, (name, architecture) in enumerate(ARCHITECTURES.items()):
        found = tensors(topology, architecture, 1.0)
        with closing(Checkpointer(Path(folder) / name, keep=1, background=place % 2 == 0)) as checkpointer:
            checkpointer.save(3, found, {})
            for tensor in found.values():  # what the thread writes is a copy
                local(tensor).zero_()


def load(layout: Layout, folders: list[str], others: list[str]) -> dict[str, list[str]]:
    """By architecture, the tensors that differ after loading each checkpoint over other values.

    LLaMA is loaded from all ``folders``, the other architectures from ``others``: what a layout does to a tensor
    depends on its dimensions alone.
    """
    topology, wrong = start(layout, torch.device("cpu")), {}
    for name, architecture in ARCHITECTURES.items():
        right, found = (tensors(topology, architecture, scale) for scale in (1.0, -1.0))
        wrong[name] = []
        for folder in folders if name in PAIRED else others:
            for tensor in found.values():
                local(tensor).zero_()
            sharded.load(checkpoint_of(folder, name), found)
            wrong[name] += [
                f"{folder}: {key}" for key in right if not torch.equal(local(found[key]), local(right[key]))
            ]
    return wrong


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checkpoint_of(folder: str, name: str) -> Path:
    checkpoint = sharded.latest(Path(folder) / name)
    assert checkpoint is not None
    return checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A folder for each layout."""
    folders = []
    for name, layout in LAYOUTS.items():
        folders.append(str(tmp_path_factory.mktemp(name.replace(" ", "-"))))
        run(layout.world, save, layout, folders[-1])
    return folders


@pytest.mark.parametrize("place", range(len(LAYOUTS)), ids=LAYOUTS.keys())
def test_any_layout_loads_what_any_layout_saved(saved: list[str], place: int) -> None:
    layout, before = list(LAYOUTS.values())[place], saved[place - 1]
    found = run(layout.world, load, layout, saved, [before])
    assert found == [{name: [] for name in ARCHITECTURES}] * layout.world


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_process_reads_whole_tensors_of_any_layout(saved: list[str], name: str) -> None:
    expected = numbered(ARCHITECTURES[name], 1.0).weights
    for folder in saved:
        reader = sharded.Reader(checkpoint_of(folder, name))
        for key, weight in expected.items():
            assert torch.equal(reader.read(key), weight), (folder, key)


def save_large(folder: str) -> tuple[int, int]:
    """32 MB, a second time in the background: the most that Python held for it, and bytes of fresh memory."""
    start(Layout(), torch.device("cpu"))
    with closing(Checkpointer(Path(folder), keep=1, background=True)) as checkpointer:
        checkpointer.save(1, {"a": torch.ones(8 << 20)}, {})
        checkpointer.wait()
        tracemalloc.start()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        checkpointer.save(2, {"a": torch.ones(8 << 20)}, {})
        checkpointer.wait()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return tracemalloc.get_traced_memory()[1], faults * resource.getpagesize()


def test_a_save_copies_once_and_into_the_same_memory(tmp_path: Path) -> None:
    """Neither the file's bytes nor fresh pages: what training waits for is the copy alone."""
    large = 32 << 20  # of these, the tensor that is saved second is fresh too
    ((held, touched),) = run(1, save_large, str(tmp_path))
    assert held < large / 4
    assert touched < 1.5 * large


def save_any_type(folder: str) -> list[str]:
    start(Layout(), torch.device("cpu"))
    types = (torch.bool, torch.bfloat16, torch.float64, torch.int64, torch.float16, torch.uint8, torch.float32)
    found = {str(dtype): (torch.arange(5) % 2).to(dtype) for dtype in types}
    found |= {"none": torch.empty(0, 3), "one": torch.tensor(3.0), "turned": torch.arange(6.0).view(2, 3).T}
    found["large"] = torch.full((4,), 3e38)  # finite, though their sum is not
    with closing(Checkpointer(Path(folder), keep=1)) as checkpointer:
        checkpointer.save(1, found, {})
    loaded = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    sharded.load(sharded.path(Path(folder), 1), loaded)
    return [name for name in found if not torch.equal(found[name], loaded[name])]


def test_tensors_of_any_type_and_size_come_back(tmp_path: Path) -> None:
    assert run(1, save_any_type, str(tmp_path)) == [[]]


class KilledError(BaseException):
    pass


def killed_while_removing(folder: str) -> list[str]:
    """The checkpoints of a run that died in the middle of removing the older one."""
    start(Layout(), torch.device("cpu"))
    checkpointer = Checkpointer(Path(folder), keep=1)
    checkpointer.save(1, {"a": torch.ones(3)}, {})

    def half(path: Path, **_: object) -> None:
        if path.is_dir():
            next(path.glob("*.safetensors")).unlink()
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KilledError):
            checkpointer.save(2, {"a": torch.ones(3)}, {})
    left = sharded.checkpoints(Path(folder))
    for checkpoint in left:
        sharded.verify(checkpoint)
    checkpointer = Checkpointer(Path(folder), keep=1)
    return [path.name for path in [*left, *(Path(folder) / sharded.FOLDER).iterdir()]]


def order_of_writes(folder: str) -> list[str]:
    """Of a save: what went to the disk and what got its name, in order."""
    start(Layout(), torch.device("cpu"))
    told: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name(path: object) -> str:
        return Path(str(path)).name

    def fsync_(descriptor: int) -> None:
        told.append(f"sync {name(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync_)
        patch.setattr(os, "rename", lambda old, new: (told.append(f"name {name(new)}"), rename(old, new)))
        patch.setattr(os, "replace", lambda old, new: (told.append(f"name {name(new)}"), replace(old, new)))
        Checkpointer(Path(folder), keep=1).save(1, {"a": torch.ones(3)}, {})
    return told


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    (told,) = run(1, order_of_writes, str(tmp_path))
    tensors, progress, *rest = told
    assert tensors.startswith("sync shard-")
    assert progress.startswith("sync .progress.json.")
    assert rest == ["name progress.json", "sync step-00000001.partial", "name step-00000001", "sync checkpoints"]


def test_a_checkpoint_that_is_half_removed_is_none(tmp_path: Path) -> None:
    assert run(1, killed_while_removing, str(tmp_path)) == [["step-00000002"] * 2]


def last_good_while_saving(folder: str) -> str:
    start(Layout(), torch.device("cpu"))
    with closing(Checkpointer(Path(folder), keep=1, background=True)) as checkpointer:
        checkpointer.save(1, {"a": torch.ones(3)}, {})
        checkpointer.wait()
        finish = checkpointer._finish
        checkpointer._finish = lambda *given: time.sleep(1) or finish(*given)  # type: ignore[method-assign,func-returns-value]
        checkpointer.save(2, {"a": torch.ones(3)}, {})
        return checkpointer.last_good()


def test_the_last_good_checkpoint_is_there_when_the_run_has_ended(tmp_path: Path) -> None:
    """One in the background ends with the run, and takes the one before it away."""
    assert run(1, last_good_while_saving, str(tmp_path)) == [f"The last good checkpoint is {sharded.path(tmp_path, 2)}"]


def test_a_checkpoint_that_is_not_whole_is_refused(saved: list[str], tmp_path: Path) -> None:
    checkpoint = checkpoint_of(saved[3], "llama")  # sharded over three files
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    last = sorted((tmp_path / checkpoint.name).glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="bytes, not"):
        sharded.Reader(tmp_path / checkpoint.name)
    last.unlink()
    with pytest.raises(ValueError, match="is missing"):
        sharded.Reader(tmp_path / checkpoint.name)
