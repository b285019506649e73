"""A teacher's samples on disk, by window of the data: made once, read whenever a run comes to a window again.

A folder holds ``cache.json``, which says what the samples are of, and a folder per domain with safetensors files of
many windows, each named by the sha256 of its content: written whole or not at all, by any rank, in any order.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from shear_kernels.sampling import WHOLE

from shear_tron.data.manifest import DomainName, Manifest
from shear_tron.data.permutation import Integers
from shear_tron.files import sha256, write_atomically
from shear_tron.reading import in_one_line, read_json, short

FILE = "cache.json"
FORMAT = 1
_SIZES = {"ids": 3, "parts": 3, "information": 2}  # axes: window, token, sample
FILE_BYTES = 1 << 28  # of samples that wait in memory for their file
Positive = Annotated[int, Field(ge=1, le=1 << 40)]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Facts:
    """What samples are of; all but ``teacher`` and ``precision`` bind the run that learns from them."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    teacher: str  # sha256 of its architecture and weights
    precision: str  # that it ran in
    tokenizer: str  # sha256
    vocab: Positive  # rows of its head
    sequence: Positive
    samples: Positive  # per token
    temperature: Annotated[float, Field(gt=0)]
    document_masking: bool
    domains: dict[DomainName, str]  # sha256 of each one's training shards

    @classmethod
    def of(cls, manifest: Manifest, names: Sequence[str], **rest: Any) -> "Facts":
        domains = {name: _fingerprint(manifest, name) for name in names}
        return cls(tokenizer=manifest.tokenizer_sha256, domains=domains, **rest)

    @property
    def token_bytes(self) -> int:
        """On disk."""
        return self.samples * (2 + self.id_type.itemsize) + 4

    @property
    def id_type(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.vocab <= 1 << 16 else np.uint32)


def _fingerprint(manifest: Manifest, name: str) -> str:
    shards = "".join(shard.sha256 for shard in manifest.domain(name).train)
    return hashlib.sha256(shards.encode()).hexdigest()


class Cache:
    """The samples of a folder, and which windows they are of.

    Raises ValueError, in one line, for a folder that is none or has a file that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / FILE).is_file():
            raise ValueError(f"distill.cache={folder} holds no {FILE}; fill it with `shear-tron cache-teacher CONFIG`")
        try:
            content = read_json(self.folder / FILE)
            if (found := content.pop("format", None)) != FORMAT:
                raise ValueError(f"format={short(found)}, not {FORMAT}")
            self.facts = TypeAdapter(Facts).validate_json(json.dumps(content), strict=True)
        except ValueError as error:
            reason = in_one_line(error)
            raise ValueError(f"{self.folder / FILE} is damaged ({reason}); delete {folder} and fill it again") from None
        self._places = {name: self._read_places(name) for name in self.facts.domains}

    @classmethod
    def make(cls, folder: str | Path, facts: Facts) -> None:
        """Make ``folder`` a cache of ``facts``, or add its domains to one. ValueError where it is of something else."""
        path = Path(folder)
        if (path / FILE).exists():
            before = cls(path).facts
            require_same(folder, before, facts, ("teacher", "precision"))
            facts = replace(facts, domains={**before.domains, **facts.domains})
        for name in facts.domains:
            (path / name).mkdir(parents=True, exist_ok=True)
        write_atomically(path / FILE, json.dumps({"format": FORMAT, **asdict(facts)}, indent=1) + "\n")

    def files(self) -> list[Path]:
        return [file for name in self.facts.domains for file in sorted((self.folder / name).glob("*.safetensors"))]

    def windows(self, domain: str) -> Integers:
        """The windows of a domain that are there, sorted."""
        return self._places[domain][0]

    def read(self, domain: str, window: int) -> Arrays:
        """ids and parts (see ``sample_teacher``) [sequence, samples], and information [sequence], of one window.

        Raises ValueError where it is not there.
        """
        windows, files, rows = self._places[domain]
        at = int(np.searchsorted(windows, window))
        if at == len(windows) or windows[at] != window:
            raise ValueError(
                f"window {window} of domain {domain} is not in distill.cache={self.folder}; fill it with `shear-tron "
                "cache-teacher CONFIG` (where the mixture moves, with a larger --headroom) and start again: the run "
                "goes on from its last checkpoint"
            )
        file = _opened(files[at])
        found = {key: file.get_slice(key)[rows[at]] for key in _SIZES}
        whole = (found["parts"].sum(-1, dtype=np.int64) == WHOLE).all() and found["ids"].max() < self.facts.vocab
        if not whole or not np.isfinite(found["information"]).all():
            raise ValueError(f"{files[at]} is damaged; delete it and fill the cache again")
        return found

    def _read_places(self, domain: str) -> tuple[Integers, list[Path], list[int]]:
        found: list[tuple[int, Path, int]] = []
        for file in sorted((self.folder / domain).glob("*.safetensors")):
            try:
                numbers = self._require_whole(file)
            except (SafetensorError, OSError, ValueError) as error:
                reason = in_one_line(error)
                raise ValueError(f"{file} is damaged ({reason}); delete it and fill the cache again") from None
            found += [(number, file, row) for row, number in enumerate(numbers)]
        found.sort(key=lambda place: place[0])
        windows = np.array([number for number, _, _ in found], dtype=np.int64)
        return windows, [file for _, file, _ in found], [row for _, _, row in found]

    def _require_whole(self, file: Path) -> list[int]:
        """The windows in a file whose tensors have the types and sizes that they should."""
        if not file.is_file():
            raise ValueError("it is no file")
        opened = _opened(file)
        numbers = opened.get_tensor("window")
        if numbers.dtype != np.int64 or numbers.ndim != 1:
            raise ValueError("its windows are no numbers")
        id_type = {2: "U16", 4: "U32"}[self.facts.id_type.itemsize]
        for key, dtype in (("ids", id_type), ("parts", "U16"), ("information", "F32")):
            part = opened.get_slice(key)
            size = [len(numbers), self.facts.sequence, self.facts.samples][: _SIZES[key]]
            if part.get_shape() != size or part.get_dtype() != dtype:
                raise ValueError(f"its {key} are not {dtype} of size {size}")
        return [int(number) for number in numbers]

    def verify(self) -> int:
        """Read everything; returns how many windows. ValueError for the first file that is not what was written."""
        for file in self.files():
            if sha256(file) != file.stem:
                raise ValueError(f"{file} does not have its sha256: it is damaged; delete it and fill the cache again")
        return sum(len(windows) for windows, _, _ in self._places.values())


@lru_cache(maxsize=256)
def _opened(file: Path) -> Any:
    return safe_open(file, framework="np")


def require_same(folder: str | Path, found: Facts, wanted: Facts, also: Sequence[str] = ()) -> None:
    """ValueError, naming the first, where samples are of something else than ``wanted``. also: further facts to ask."""
    for key in ("tokenizer", "vocab", "sequence", "samples", "temperature", "document_masking", *also):
        there, here = getattr(found, key), getattr(wanted, key)
        if there != here:
            raise ValueError(
                f"distill.cache={folder} was filled with {key}={short(there, 12)}, and this run has {short(here, 12)}; "
                "use another folder, or the same settings"
            )
    for name, here in wanted.domains.items():
        if name in found.domains and found.domains[name] != here:
            raise ValueError(
                f"distill.cache={folder} was filled from another {name}: the data was prepared anew; use another folder"
            )


class Writer:
    """Gathers windows of a domain and writes files of them. ``close`` writes the last."""

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.folder, self.facts = folder, facts
        self.most = max(1, FILE_BYTES // (facts.token_bytes * facts.sequence))
        self._waiting: list[Arrays] = []

    def add(self, window: int, ids: Any, parts: Any, information: Any) -> None:
        """One window's: [sequence, samples] twice, and [sequence]."""
        self._waiting.append(
            {
                "window": np.asarray(window, dtype=np.int64),
                "ids": np.asarray(ids, dtype=self.facts.id_type),
                "parts": np.asarray(parts, dtype=np.uint16),
                "information": np.asarray(information, dtype=np.float32),
            }
        )
        if len(self._waiting) >= self.most:
            self.close()

    def close(self) -> None:
        if self._waiting:
            content = save({key: np.stack([each[key] for each in self._waiting]) for key in self._waiting[0]})
            name = hashlib.sha256(content).hexdigest()
            write_atomically(self.folder / f"{name}.safetensors", content)
            self._waiting.clear()
