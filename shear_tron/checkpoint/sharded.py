"""Checkpoints of a running training, written by all ranks and readable in any other layout.

torch.distributed.checkpoint with its safetensors storage: every file is readable by the safetensors library, and
nothing is pickled. What is not a tensor goes to ``progress.json``. A checkpoint appears under its name only when it is
whole.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from shear_tron.parallel.agree import require_all

PROGRESS = "progress.json"


_NAME = re.compile(r"step-[0-9]{8}")


def path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = checkpoints(run)
    return found[-1] if found else None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: folders with exactly our kind of name that hold our ``progress.json``.

    Anything else that lies there is somebody's own (``step-original``, a link, a copy) and left alone.
    """
    folder = run / "checkpoints"
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [folder / name for name in names if _NAME.fullmatch(name)]
    return [path for path in found if not path.is_symlink() and (path / PROGRESS).is_file()]


def progress(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside the tensors. ValueError where it cannot be read, or a file of the checkpoint is not whole.

    A missing file must be found here: sizes of tensors are inferred from the parts that are there.
    """
    file = checkpoint / PROGRESS
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); the checkpoint is damaged, use an earlier one") from None
    for name, size in content["files"].items():
        part = checkpoint / name
        found = part.stat().st_size if part.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise ValueError(f"{part} {state}; the checkpoint is damaged or half copied, use an earlier one")
    return content


def save(run: Path, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint; call on all ranks with the same names where tensors are shared.

    tensors: DTensors (each rank writes its part) and plain tensors (equal on all ranks that have them). Afterwards the
    newest ``keep`` checkpoints of the run are on disk. AgreedError where a value is not finite: nothing is written.
    """
    require_finite(tensors, f"step {progress['step']} is not saved")
    final = path(run, step)
    partial = final.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_distributed(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
    if dist.get_rank() == 0:
        files = {file.name: file.stat().st_size for file in sorted(partial.glob("*.safetensors"))}
        (partial / PROGRESS).write_text(json.dumps({**progress, "files": files}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(run)[:-keep]:
            if old != final:
                shutil.rmtree(old)
    dist.barrier()


def require_finite(tensors: Mapping[str, Tensor], consequence: str) -> None:
    """AgreedError on all ranks where a tensor of any rank holds NaN or infinity. Collective."""
    problem = None
    for name, tensor in tensors.items():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not bool(part.isfinite().all()):
            problem = f"{consequence}: {name} holds NaN or infinite values"
            break
    require_all(problem)


def load(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` in place from a checkpoint of any layout; call on all ranks. ValueError if it is damaged."""
    progress(checkpoint)
    load_distributed(dict(tensors), storage_reader=HuggingFaceStorageReader(str(checkpoint)))


class Reader:
    """Whole tensors of a checkpoint, one at a time, in one process without ranks."""

    def __init__(self, checkpoint: Path) -> None:
        progress(checkpoint)
        try:
            metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata()
        except Exception as error:  # safetensors' own error is a bare Exception type
            raise ValueError(
                f"{checkpoint} cannot be read ({error}); the checkpoint is damaged or half copied"
            ) from None
        self.sizes = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
        self._chunks: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for index, stored in metadata.storage_data.items():
            self._chunks.setdefault(index.fqn, []).append((stored.relative_path, tuple(index.offset)))

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``. Raises ValueError where parts of it are missing."""
        if name not in self.sizes:
            raise ValueError(f"the checkpoint has no tensor {name!r}; it is not of this kind of run, or damaged")
        whole, filled = None, 0
        for file, offset in self._chunks[name]:
            with safe_open(file, framework="pt") as opened:
                part = opened.get_tensor(name)
            if whole is None:
                whole = torch.empty(self.sizes[name], dtype=part.dtype)
            window = tuple(slice(start, start + length) for start, length in zip(offset, part.shape, strict=True))
            whole[window] = part
            filled += part.numel()
        if whole is None or filled != whole.numel():
            raise ValueError(f"parts of {name} are missing from the checkpoint; it is damaged or half copied")
        return whole
