"""What a rank writes of a checkpoint: one safetensors file, one tensor after the other, hashed on the way.

torch's own safetensors storage makes the file's bytes in memory before it writes them, twice, and holds the interpreter
meanwhile, which training waits for. This one plans and names as that does, so torch's reader reads it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shear_tron.checkpoint.safetensors_stream import header

SMALL = 64 << 10  # bytes of a tensor that is written together with others
CHUNK = 4 << 20  # bytes hashed, and written while the processor's caches have them


class Storage(HuggingFaceStorageWriter):
    """Writes into ``folder`` what ``parts`` holds of the tensors that are planned: this rank's part of each, by name.

    ``files``: size and sha256 of what was written and is on the disk, by name.
    """

    def __init__(self, folder: Path, parts: Mapping[str, Tensor]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.parts = folder, parts
        self.files: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # The widest first: each then begins at a multiple of its own width.
        items = sorted(plan.items, key=lambda item: -self.parts[item.index.fqn].itemsize)
        if items:
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            offsets = {item.index.fqn: {"saved_offsets": item.index.offset or ()} for item in items}
            self.files[name] = self._write(self.folder / name, offsets)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(item.index, self.parts[item.index.fqn].nbytes, None) for item in items])
        return written

    def _write(self, path: Path, offsets: Mapping[str, Any]) -> dict[str, Any]:
        parts = {name: self.parts[name] for name in offsets}
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        text, _ = header({name: (part.dtype, part.shape) for name, part in parts.items()}, metadata)
        digest, length = hashlib.sha256(), 0
        with path.open("wb") as file:
            for chunk in _chunks(text, parts):
                digest.update(chunk)
                file.write(chunk)
                length += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": length, "sha256": digest.hexdigest()}


def _chunks(text: bytes, parts: Mapping[str, Tensor]) -> Iterator[bytes | bytearray | memoryview]:
    """A file's content in its order: small tensors together, large ones in pieces, which are not copied."""
    together = bytearray(text)
    for part in parts.values():
        content = part.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        if len(content) <= SMALL and len(together) < CHUNK:
            together += content
            continue
        if together:
            yield together
            together = bytearray()
        yield from (content[start : start + CHUNK] for start in range(0, len(content), CHUNK))
    yield together
