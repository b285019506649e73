"""Finding documents whose text came before, within a domain or anywhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shear_tron.data.shards import WORK, Sign, Task, save_atomically
from shear_tron.files import sha256

BUCKET = 50_000_000  # fingerprints sorted at a time: about 2 GB


def drop_duplicates(tasks: list[Task], output: str, across: bool) -> list[Task]:
    """The tasks with ``keep`` set: the first of equal texts stays, in the order of domains, files and lines.

    Needs the fingerprints that ``Sign`` wrote. ``across``: equal texts of different domains count as equal. The new
    key includes what is kept, so a task is done again when an earlier file takes a document from it.
    """
    if across:
        return _drop(tasks, output)
    names = list(dict.fromkeys(task.domain for task in tasks))
    return [task for name in names for task in _drop([task for task in tasks if task.domain == name], output)]


def _drop(tasks: list[Task], output: str) -> list[Task]:
    signatures = [Sign.read(output, task) for task in tasks]
    ends = np.cumsum([len(part) for part in signatures])
    keep = np.zeros(int(ends[-1]), dtype=bool)
    buckets = int(ends[-1]) // BUCKET + 1
    for bucket in range(buckets):
        places = [np.flatnonzero(part[:, 1] % np.uint64(buckets) == bucket) for part in signatures]
        chosen = np.concatenate([part[place] for part, place in zip(signatures, places, strict=True)])
        position = np.concatenate(
            [place + end - len(part) for part, place, end in zip(signatures, places, ends, strict=True)]
        )
        keep[position[firsts(chosen)]] = True
    return [_keep(task, Path(output) / WORK, kept) for task, kept in zip(tasks, np.split(keep, ends[:-1]), strict=True)]


def firsts(signatures: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Places of the first of each group of equal rows."""
    order = np.lexsort((signatures[:, 1], signatures[:, 0]))  # stable: equal rows stay in order
    rows = signatures[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return order[new]


def _keep(task: Task, folder: Path, keep: npt.NDArray[np.bool_]) -> Task:
    file = folder.absolute() / f"{task.key}.keep.npy"
    save_atomically(file, keep)
    return replace(task, keep=str(file), key=f"{task.key}-{sha256(file)[:8]}")
