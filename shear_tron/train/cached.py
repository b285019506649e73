"""A teacher that need not be there: its samples are filled into a cache beforehand, and read from it in a run."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from shear_kernels import sample_teacher
from shear_kernels.sampling import WHOLE
from torch import Tensor

from shear_tron.checkpoint.model_folder import Model
from shear_tron.data import permutation
from shear_tron.data.permutation import Integers
from shear_tron.data.sampler import Windows
from shear_tron.model.context import DENSE, Context, TeacherSamples, TeacherStates
from shear_tron.parallel.agree import require_all
from shear_tron.parallel.topology import Topology
from shear_tron.progress import bar
from shear_tron.train.cache import Cache, Writer
from shear_tron.train.drawn import count, drawn, facts, missing, told
from shear_tron.train.plan import Inputs, Plan
from shear_tron.train.teacher import Teacher, teacher_precision


class CachedTeacher:
    """Gives the microbatches of a step their teacher's samples, on ranks that hold the last stage.

    Args:
        names: of domains, in the order in which the sampler knows them.
        count: microbatches in this rank's share of a batch.
    """

    flops = 0.0

    def __init__(self, cache: Cache, names: Sequence[str], topology: Topology, count: int) -> None:
        self.cache, self.names, self.topology, self.count = cache, tuple(names), topology, count
        self.is_read = topology.pp_rank == topology.layout.pp - 1  # the last stage is there

    def teach(
        self, tokens: Tensor, contexts: Iterable[Context] | None, domains: Tensor, windows: Tensor
    ) -> Iterable[Context]:
        """The contexts of this rank's microbatches with samples. domains, windows: int64 [batch], see ``Batch``."""
        contexts = contexts or [DENSE] * self.count
        if not self.is_read:
            return contexts
        return (
            replace(context, teacher=self._samples(*places))
            for context, *places in zip(contexts, domains.chunk(self.count), windows.chunk(self.count), strict=True)
        )

    def _samples(self, domains: Tensor, windows: Tensor) -> TeacherSamples:
        places = zip(domains.tolist(), windows.tolist(), strict=True)
        found = [self.cache.read(self.names[domain], window) for domain, window in places]
        ids, parts, information = (
            torch.from_numpy(np.concatenate([each[key] for each in found]).astype(kind)).to(self.topology.device)
            for key, kind in (("ids", np.int64), ("parts", np.float32), ("information", np.float32))
        )
        return TeacherSamples(ids, parts / WHOLE, information)


class Filler:
    """Runs a teacher over windows and writes its samples into ``config.distill.cache``. Collective throughout."""

    def __init__(self, plan: Plan, inputs: Inputs, topology: Topology, compute: torch.dtype) -> None:
        self.config, self.manifest, self.topology = plan.config, inputs.manifest, topology
        assert self.config.distill is not None
        assert inputs.teacher is not None
        self.distill, self.folder = self.config.distill, Path(self.config.distill.cache or "")
        self.mixture = dict(zip(inputs.names, inputs.proportions, strict=True))
        self.share = self.config.train.batch // topology.layout.dp  # windows that a data-parallel rank takes at a time
        dtype, vocab = teacher_precision(self.config, compute), inputs.teacher.architecture.shape.vocab
        problem = None
        if topology.is_main:
            try:
                sha, precision = fingerprint(inputs.teacher), str(dtype).removeprefix("torch.")
                of = facts(self.config, self.manifest, self.mixture, vocab, teacher=sha, precision=precision)
                Cache.make(self.folder, of)
            except (ValueError, OSError) as error:
                problem = str(error)
        require_all(problem)
        self.cache = Cache(self.folder)
        self.teacher = Teacher.of(plan, inputs, topology, compute)

    def fill(self, headroom: float | None, say: Callable[[str], None]) -> None:
        """All windows that the run draws and the cache lacks; see ``drawn``. AgreedError where the disk is too small.

        Killed, it goes on where it was but for the windows of files not yet written.
        """
        of, wanted = self.cache.facts, drawn(self.config, self.manifest, self.mixture, headroom)
        lacking = missing(self.cache, wanted)
        need, free = count(lacking) * of.token_bytes * of.sequence, shutil.disk_usage(self.folder).free
        problem = None
        if need > free:
            problem = f"{self.folder} needs {need / 1e9:,.3g} GB and its disk has {free / 1e9:,.3g}; use fewer samples"
        require_all(problem)  # and by now all have seen what is there
        say(told(self.folder, of, wanted, lacking))
        with bar(f"filling {self.folder}", count(lacking), "windows", silent=not self.topology.is_main) as filled:
            for name, windows in lacking.items():
                reader = Windows(self.manifest, self.manifest.domain(name).train, of.sequence)
                with closing(Writer(self.folder / name, of)) as writer:
                    for first in range(0, len(windows), self.config.train.batch):
                        self._fill(writer, reader, name, windows[first : first + self.config.train.batch])
                        filled.update(min(self.config.train.batch, len(windows) - first))
        require_all(None)  # all is written

    def _fill(self, writer: Writer, reader: Windows, name: str, windows: Integers) -> None:
        """A batch of windows, or what is left of the last: its ranks then repeat some, and write none twice."""
        places = np.arange(self.share) + self.topology.dp_rank * self.share
        own = windows[places % len(windows)]
        tokens = np.empty((self.share, reader.sequence + 1), dtype=reader.stream.dtype)
        reader.read_into(tokens, np.arange(self.share), own)
        inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64)).to(self.topology.device)
        at = 0
        for context in self.teacher.teach(inputs, None):
            if not isinstance(context.teacher, TeacherStates):
                return  # another pipeline rank has them
            for rows in torch.split(context.teacher.states, reader.sequence):
                ids, parts, information = self._sampled(rows, context.teacher.head, name, int(own[at]))
                if self.topology.tp_rank == 0 and places[at] < len(windows):
                    writer.add(int(own[at]), ids.cpu(), parts.cpu(), information.cpu())
                at += 1

    def _sampled(self, states: Tensor, head: Tensor, name: str, window: int) -> tuple[Tensor, Tensor, Tensor]:
        split = self.teacher.engine.stages[0].split
        keys = permutation.keys("samples of a teacher", name, window)[:2]
        words = np.random.Philox(key=keys).random_raw((2, len(states)))
        points = torch.from_numpy((words >> np.uint64(11)).astype(np.float64)) * 2.0**-53
        return sample_teacher(
            states,
            head,
            self.distill.samples,
            points.to(states.device),
            self.distill.temperature,
            first=split.rank * head.shape[0],
            vocab=split.size * head.shape[0],
            all_reduce_sum=split.all_reduce_sum,
        )


def fingerprint(model: Model) -> str:
    """sha256 of a model's architecture and weights, in whatever files they are. Reads all of them."""
    found = hashlib.sha256(repr(model.architecture).encode())
    for name in model.names():
        found.update(model.read(name).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
