"""Law 5: saved in one layout and loaded in another is never saved: every tensor is the same, to the bit."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run
from torch import Tensor, nn

from shear_tron.architecture import Architecture
from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.checkpointer import Checkpointer
from shear_tron.model.transformer import Transformer
from shear_tron.parallel.data import shard
from shear_tron.parallel.pipeline import build_stages
from shear_tron.parallel.topology import Layout, start
from shear_tron.shape import Shape
from shear_tron.train.pruner import moments, start_moments

SHAPE = Shape(hidden=24, layers=4, heads=8, kv_heads=4, head_dim=6, ffn=20, vocab=42)
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2, schedule="interleaved", stages_per_rank=2),
    "fsdp4": Layout(shard=4),  # 42 and 6 rows over 4 ranks: uneven
    "dp2 x tp2": Layout(replicate=2, tp=2),
    "fsdp2 x tp2 x pp2": Layout(shard=2, tp=2, pp=2),
}


class Numbered:
    """Weights that anyone can recompute: different in every entry of every tensor."""

    def __init__(self, shape: Shape, scale: float) -> None:
        model = Transformer(Architecture(shape))
        self.weights = {
            name: (torch.arange(p.numel()).view(p.shape) + 1000 * place) * scale
            for place, (name, p) in enumerate(model.named_parameters())
        }

    def read(self, name: str) -> Tensor:
        return self.weights[name].clone()

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        return self.weights[name].narrow(axis, start, stop - start).clone()


def tensors(layout: Layout, shape: Shape, scale: float) -> dict[str, Tensor]:
    """What a trainer checkpoints: weights, Adam's moments, and a tensor that every rank has."""
    topology = start(layout, torch.device("cpu"))
    stages = [
        shard(stage, Numbered(shape, scale), topology, torch.float32, torch.float32)
        for stage in build_stages(Architecture(shape), topology, "none")
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


def save(layout: Layout, shape: Shape, folder: str, background: bool) -> None:
    found = tensors(layout, shape, 1.0)
    with closing(Checkpointer(Path(folder), keep=1, background=background)) as checkpointer:
        checkpointer.save(3, found, {})
        for tensor in found.values():  # what the thread writes is a copy
            tensor.zero_()


def load(layout: Layout, shape: Shape, folders: list[str]) -> list[str]:
    """Names of tensors that differ after loading each checkpoint over other values."""
    right = tensors(layout, shape, 1.0)
    wrong = []
    for folder in folders:
        found = tensors(layout, shape, -1.0)
        checkpoint = sharded.latest(Path(folder))
        assert checkpoint is not None
        sharded.load(checkpoint, found)
        wrong += [f"{folder}: {name}" for name in right if not _equal(found[name], right[name])]
    return wrong


def _equal(a: Tensor, b: Tensor) -> bool:
    if hasattr(a, "to_local"):
        a, b = a.to_local(), b.to_local()  # type: ignore[operator, attr-defined]
    return torch.equal(a, b)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied, in the background"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shape, list[str]]:
    shape = replace(SHAPE, tied=request.param)
    folders = []
    for name, layout in LAYOUTS.items():
        folders.append(str(tmp_path_factory.mktemp(name.replace(" ", "-"))))
        run(layout.world, save, layout, shape, folders[-1], request.param)
    return shape, folders


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_loads_what_any_layout_saved(saved: tuple[Shape, list[str]], layout: Layout) -> None:
    shape, folders = saved
    assert run(layout.world, load, layout, shape, folders) == [[]] * layout.world


def test_one_process_reads_whole_tensors_of_any_layout(saved: tuple[Shape, list[str]]) -> None:
    shape, folders = saved
    expected = Numbered(shape, 1.0).weights
    for folder in folders:
        checkpoint = sharded.latest(Path(folder))
        assert checkpoint is not None
        reader = sharded.Reader(checkpoint)
        for name, weight in expected.items():
            assert torch.equal(reader.read(name), weight), (folder, name)


def test_a_checkpoint_that_is_not_whole_is_refused(saved: tuple[Shape, list[str]], tmp_path: Path) -> None:
    import shutil

    checkpoint = sharded.latest(Path(saved[1][3]))  # sharded over four files
    assert checkpoint is not None
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    last = sorted((tmp_path / checkpoint.name).glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="bytes, not"):
        sharded.Reader(tmp_path / checkpoint.name)
    last.unlink()
    with pytest.raises(ValueError, match="is missing"):
        sharded.Reader(tmp_path / checkpoint.name)
