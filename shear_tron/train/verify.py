"""Is a folder what was written? Every byte is read: prepared data, checkpoints of a run, models."""

from pathlib import Path

from shear_tron.checkpoint import sharded
from shear_tron.checkpoint.model_folder import is_nanotron, open_model
from shear_tron.data.manifest import FILE, Manifest
from shear_tron.parallel.agree import require_all
from shear_tron.parallel.topology import Topology, rank
from shear_tron.progress import bar
from shear_tron.train import cache
from shear_tron.train.run_folder import CONFIG


def verify(folder: str) -> str:
    """Check all of ``folder``. Returns what it is, in a sentence; ValueError in one line for the first damage found."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"{folder} is no folder; give prepared data, a run, a checkpoint, a model or a teacher's cache"
        )
    if (path / FILE).exists():
        return f"{folder}: prepared data, whole: {_data(folder)}"
    if (path / cache.FILE).exists():
        return f"{folder}: samples of a teacher, whole: {cache.Cache(path).verify():,} windows"
    if (path / sharded.PROGRESS).exists():
        sharded.verify(path)
        return f"{folder}: a checkpoint, whole: step {sharded.step_of(path)}"
    if (path / CONFIG).exists():
        return f"{folder}: a run, whole: {_run(path)}"
    kind = "nanotron checkpoint" if is_nanotron(path) else "Hugging Face model"
    return f"{folder}: a {kind}, whole: {_model(folder)}"


def _data(folder: str) -> str:
    manifest = Manifest.read(folder)
    shards = manifest.shards()
    for shard in bar(f"reading {folder}", len(shards), "shards", iterable=shards):
        manifest.verify_shard(shard)
    tokens = sum(shard.tokens for shard in shards)
    return f"{len(manifest.domains)} domains, {len(shards)} shards, {tokens:,} tokens"


def _run(run: Path) -> str:
    found = sharded.checkpoints(run)
    for checkpoint in bar(f"reading {run}", len(found), "checkpoints", iterable=found):
        sharded.verify(checkpoint)
    return "checkpoints of steps " + (", ".join(str(sharded.step_of(checkpoint)) for checkpoint in found) or "none")


def _model(folder: str) -> str:
    """A model's files carry no hash: only damage that shows in headers, sizes and values is found."""
    model = open_model(folder)
    names = model.names()
    for name in bar(f"reading {folder}", len(names), "tensors", iterable=names):
        if not bool(model.read(name).isfinite().all()):
            raise ValueError(f"{name} of {folder} holds NaN or infinite values; fetch or write it again")
    return f"{len(names)} tensors, all values finite, {model.architecture.shape}"


def verify_together(manifest: Manifest, topology: Topology) -> None:
    """Read every shard once, each rank its share. Collective; AgreedError where one is not what was written."""
    problem = None
    try:
        for shard in manifest.shards()[rank() :: topology.layout.world]:
            manifest.verify_shard(shard)
    except (OSError, ValueError) as error:
        problem = str(error)
    require_all(problem)
