"""What a broken run says: one rank speaks for all, and names those that fell silent."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_FIRST, _HERE = "shear_tron/first", "shear_tron/here/{}"
PATIENCE = 3.0  # seconds in which a rank that is alive has noticed that another is not


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` says only that another rank is gone or late, and not why.

    Pipelines raise an error of their own from it.
    """
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
        return True
    return error.__cause__ is not None and lost_peer(error.__cause__)


def is_first_to_fail() -> bool:
    """Whether no rank has asked this before: it is the one to speak. Needs no rank but the store's to be alive."""
    try:
        store = _get_default_store()
        store.set(_HERE.format(dist.get_rank()), "")
        return bool(store.add(_FIRST, 1) == 1)
    except (RuntimeError, ValueError):  # the store died with its rank: better said twice than never
        return True


def silent_ranks(patience: float = PATIENCE) -> list[int]:
    """The ranks that have not come to ``is_first_to_fail`` within ``patience`` seconds: killed, or stuck."""
    silent = list(range(dist.get_world_size()))
    deadline = time.monotonic() + patience
    try:
        store = _get_default_store()
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([_HERE.format(rank)])]
            time.sleep(0.05)
    except (RuntimeError, ValueError):
        return []
    return silent


def keep_recording(folder: Path) -> Path | None:
    """Write what this rank's collectives did last, as torch's flight recorder has it, to a JSON file in ``folder``.

    None where this torch records nothing, or the disk refuses.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank-{dist.get_rank()}.json"
        file.write_bytes(dump())
    except (OSError, RuntimeError, ValueError):
        return None
    return file
