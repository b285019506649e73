"""Checkpoints of a running training: what is in one, whether it is whole, and reading it in any layout or in none.

torch.distributed.checkpoint with its safetensors storage: every file is readable by the safetensors library, and
nothing is pickled. What is not a tensor goes to ``progress.json``, with the size and sha256 of every file. Writing is
``shear_tron.checkpoint.checkpointer``'s.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import Tensor

from shear_tron.checkpoint.safetensors_stream import is_finite
from shear_tron.files import sha256
from shear_tron.parallel.agree import AgreedError, require_all
from shear_tron.reading import in_one_line, read_json

FOLDER, PROGRESS = "checkpoints", "progress.json"
_NAME = re.compile(r"step-[0-9]{8}")


class File(BaseModel):
    """A file of a checkpoint."""

    model_config = ConfigDict(extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str


class Progress(BaseModel):
    """What ``progress.json`` holds beside its own sha256. ``state`` is the trainer's: everything but tensors."""

    model_config = ConfigDict(extra="forbid")
    step: int = Field(ge=0)
    files: dict[Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")], File] = Field(min_length=1)
    state: dict[str, Any]


def path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def is_name(name: str) -> bool:
    """Whether a checkpoint is called so."""
    return _NAME.fullmatch(name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = checkpoints(run)
    return found[-1] if found else None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: folders with exactly our kind of name that hold our ``progress.json``.

    Anything else that lies there is somebody's own (``step-original``, a link, a copy) and left alone.
    """
    folder = run / FOLDER
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [folder / name for name in names if is_name(name)]
    return [path for path in found if not path.is_symlink() and (path / PROGRESS).is_file()]


def outdated(steps: Sequence[int], newest: int, keep: int, keep_every: int) -> list[int]:
    """Those of ``steps``, in order, that go once ``newest`` is whole: all but the last ``keep``, itself, and multiples
    of ``keep_every``; 0: no multiples stay."""
    return [old for old in steps[:-keep] if old != newest and not (keep_every and old % keep_every == 0)]


def sealed(content: Mapping[str, Any]) -> str:
    """``progress.json``: ``content`` as JSON with its own sha256 beside."""
    return json.dumps({**content, "sha256": _seal(content)})


def progress(checkpoint: Path) -> Progress:
    """What was saved beside the tensors. ValueError where it is damaged, or a file of the checkpoint has another size.

    A missing file must be found here: sizes of tensors are inferred from the parts that are there.
    """
    file = checkpoint / PROGRESS
    try:
        content = read_json(file)
        seal = content.pop("sha256", None)
        found = Progress.model_validate(content, strict=True)
        if seal != _seal(content):
            raise ValueError("it does not have its sha256")
    except ValueError as error:
        reason = in_one_line(error)
        raise ValueError(f"{file} cannot be read ({reason}); the checkpoint is damaged, use an earlier one") from None
    if path(Path(), found.step).name != checkpoint.name:
        raise ValueError(f"{checkpoint} holds step {found.step}; give the folder its own name back")
    for name, stored in found.files.items():
        part = checkpoint / name
        size = part.stat().st_size if part.exists() else None
        if size != stored.bytes:
            state = "is missing" if size is None else f"has {size} bytes, not {stored.bytes}"
            raise ValueError(f"{part} {state}; the checkpoint is damaged or half copied, use an earlier one")
    if strange := sorted({part.name for part in checkpoint.glob("*.safetensors")} - set(found.files)):
        raise ValueError(
            f"{checkpoint / strange[0]} is no part of that checkpoint, and would be read with it; remove it"
        )
    return found


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(checkpoint: Path, first: int = 0, step: int = 1) -> None:
    """Read files ``first``, ``first + step`` ... of a checkpoint. ValueError for one that has not its sha256."""
    for name, stored in sorted(progress(checkpoint).files.items())[first::step]:
        if sha256(checkpoint / name) != stored.sha256:
            raise ValueError(
                f"{checkpoint / name} does not have its sha256; the checkpoint is damaged, use an earlier one"
            )


def parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each: of DTensors the local tensor, of others all of it."""
    from torch.distributed.tensor import DTensor  # half a second that `show`, which only looks for checkpoints, saves

    return {name: each.to_local() if isinstance(each, DTensor) else each for name, each in tensors.items()}


def require_finite(tensors: Mapping[str, Tensor], consequence: str) -> None:
    """AgreedError on all ranks where a tensor of any rank holds NaN or infinity. Collective."""
    broken = next((name for name, part in parts(tensors).items() if not is_finite(part)), None)
    require_all(None if broken is None else f"{consequence}: {broken} holds NaN or infinite values")


def load(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` in place from a checkpoint of any layout. Collective; AgreedError if it is damaged.

    Ranks share the work of reading every file once to see that it is what was written.
    """
    problem = None
    try:
        verify(checkpoint, dist.get_rank(), dist.get_world_size())
    except (OSError, ValueError) as error:
        problem = str(error)
    require_all(problem)
    read_into(tensors, checkpoint)


def read_into(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill ``tensors`` in place from the safetensors files of a folder. Collective; AgreedError if they are damaged."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

    try:
        load_distributed(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:  # no Exception; all ranks get it
        reason = next(iter(error.failures.values()))[0]
        raise AgreedError(f"{folder} cannot be loaded: {reason}") from None


class Reader:
    """Whole tensors of a checkpoint, one at a time, in one process without ranks."""

    def __init__(self, checkpoint: Path) -> None:
        """Every file is read once, to see that it is what was written. ValueError if not."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        verify(checkpoint)
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
                part: Tensor = opened.get_tensor(name)
            if tuple(part.shape) == self.sizes[name]:
                return part  # mapped from its file, not copied
            if whole is None:
                whole = torch.empty(self.sizes[name], dtype=part.dtype)
            window = tuple(slice(start, start + length) for start, length in zip(offset, part.shape, strict=True))
            whole[window] = part
            filled += part.numel()
        if whole is None or filled != whole.numel():
            raise ValueError(f"parts of {name} are missing from the checkpoint; it is damaged or half copied")
        return whole
