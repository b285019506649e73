"""``shear-tron prepare``: documents of many domains to shards of token ids, with a manifest.

Every task is a short datatrove pipeline, and all domains' tasks share one executor, so a domain in one file does not
leave the other workers idle. What is done is told by receipts and not by datatrove's log folder: a second run only
does what is missing or has changed.
"""

import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, Literal

import multiprocess  # type: ignore[import-untyped]
from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger as datatrove_log
from pydantic import BaseModel, ConfigDict, Field, field_validator

from shear_tron.data import slurm
from shear_tron.data.duplicates import drop_duplicates
from shear_tron.data.manifest import Domain, Manifest
from shear_tron.data.shards import WORK, Encoding, Read, Receipt, Sign, Task, Tokenise
from shear_tron.data.stats import stats
from shear_tron.data.tasks import DomainSource, plan, require_outside
from shear_tron.data.tokenizer import Tokenizer, load
from shear_tron.hub import located
from shear_tron.progress import bar

__all__ = ["DomainSource", "PrepareConfig", "prepare", "stats"]

log = getLogger(__name__)

SHORT = 512  # tokens; with fewer held out no usual window can be evaluated


class PrepareConfig(BaseModel):
    """What to prepare.

    Every document becomes ``[bos] ids [separator]``. ``separator`` is a token string, by default the tokenizer's eos;
    ``""`` adds none. The model's own habit counts: SmolLM2 was pre-trained with ``<|endoftext|>`` between documents,
    which is not its tokenizer's eos.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str  # folder for shards and domains.json
    tokenizer: str  # a tokenizer.json, a SentencePiece tokenizer.model, or a folder or Hub id that holds one
    domains: dict[str, DomainSource] = Field(min_length=1)  # by name
    held_out: float = Field(default=0.01, ge=0, lt=1)  # share of documents, chosen by the hash of their text
    bos: bool = False  # whether every document opens with the tokenizer's bos
    separator: str | None = None  # token that closes every document; default: the tokenizer's eos; "": none
    deduplicate: Literal["no", "domain", "all"] = "no"  # exact: equal texts within a domain, or anywhere, count once
    damaged: float = Field(default=0.001, ge=0, le=1)  # share of unreadable records beyond which preparing fails
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, gt=0)  # processes; default: one per core
    piece_bytes: int = Field(default=64 * 2**20, gt=0)  # plain jsonl files are cut into pieces of it, one task each
    executor: Literal["local", "slurm"] = "local"  # where tasks run: here, or as a Slurm job array
    slurm: dict[str, Any] = {}  # partition, time, ... of datatrove's SlurmPipelineExecutor

    @field_validator("domains")
    @classmethod
    def _names(cls, domains: dict[str, DomainSource]) -> dict[str, DomainSource]:
        for name in domains:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"domain name {name!r} is used as a folder; use letters, digits, '.', '_' and '-'")
        return domains


def prepare(config: PrepareConfig) -> Manifest:
    """Make, or bring up to date, ``config.output``. With ``workers > 1`` call it under ``if __name__ == "__main__"``.

    Killed and started again, it goes on with the tasks that are missing; started again after it is done, it checks
    and returns. Raises ValueError for input that cannot be read, and for a domain that has no text.
    """
    for name, source in config.domains.items():
        require_outside(config.output, name, source)
    tokenizer = load(config.tokenizer)
    encoding = _encoding(config, tokenizer)
    settings = {"tokenizer": tokenizer.sha256, "bos": encoding.bos, "separator": encoding.separator}
    tasks = [
        task
        for name, source in config.domains.items()
        for task in plan(name, source, config.held_out, config.piece_bytes, settings)
    ]
    (Path(config.output) / WORK).mkdir(parents=True, exist_ok=True)
    with _alone(config.output):
        if config.deduplicate != "no":
            unsigned = [task for task in tasks if not Sign.path(config.output, task).is_file()]
            _run(config, unsigned, lambda task: Sign.path(config.output, task).is_file(), "find duplicates", _sign)
            tasks = drop_duplicates(tasks, config.output, across=config.deduplicate == "all")
        receipt = partial(_receipt, config.output, encoding.token_bytes)
        pending = [task for task in tasks if receipt(task) is None]
        _run(config, pending, lambda task: receipt(task) is not None, "tokenise", partial(_tokenise, encoding))
        manifest = _manifest(config, tokenizer, encoding, tasks)
        manifest.write()
        for left in (Path(config.output) / WORK).glob("*.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
    return manifest


def document(config: PrepareConfig) -> str:
    """What a document becomes, in words: the separator that a tokenizer names is not always what its model knows."""
    tokenizer = load(config.tokenizer)
    encoding = _encoding(config, tokenizer)
    parts = [f"{tokenizer.bos} ({encoding.bos})"] if config.bos else []
    parts.append("ids")
    if encoding.separator is not None:
        parts.append(f"{config.separator or tokenizer.eos} ({encoding.separator})")
    return "document = " + " + ".join(parts)


def _encoding(config: PrepareConfig, tokenizer: Tokenizer) -> Encoding:
    bos = separator = None
    if config.bos:
        if tokenizer.bos is None:
            raise ValueError(f"bos=true, but tokenizer={config.tokenizer} names no bos token; use bos=false")
        bos = tokenizer.id(tokenizer.bos)
    if config.separator != "":
        token = config.separator or tokenizer.eos
        if token is None:
            raise ValueError(f"tokenizer={config.tokenizer} names no eos token; give a separator, or '' for none")
        separator = tokenizer.id(token)
    # Ids up to 65,535 fit 2 bytes.
    return Encoding(os.path.abspath(located(config.tokenizer)), bos, separator, 2 if tokenizer.vocab <= 2**16 else 4)


def _receipt(output: str, token_bytes: int, task: Task) -> Receipt | None:
    return Receipt.read(output, task, token_bytes)


def _sign(tasks: list[Task], output: str) -> list[Any]:
    return [Read(tasks), Sign(tasks, output)]


def _tokenise(encoding: Encoding, tasks: list[Task], output: str) -> list[Any]:
    return [Read(tasks), Tokenise(tasks, output, encoding)]


@contextmanager
def _alone(output: str) -> Iterator[None]:
    """Two runs on one folder would do the same work twice."""
    with open(Path(output) / WORK / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not passed on to children
        except OSError:
            raise ValueError(f"output={output} is being prepared by another process; wait for it") from None
        yield


class _Quiet(LocalPipelineExecutor):  # type: ignore[misc]  # datatrove is untyped
    """datatrove's executor without its log on the terminal, where the progress bar is, and without its manager
    process, which would stay for ever where this one is killed."""

    def run(self) -> None:
        if self.workers == 1:
            for rank in range(self.tasks):
                self._run_for_rank(rank)
            return
        # datatrove's choice of process library, because its steps need dill.
        with multiprocess.get_context("forkserver").Pool(self.workers, initializer=_end_with_parent) as pool:
            for _ in pool.imap_unordered(self._run_for_rank, range(self.tasks)):
                pass

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        datatrove_log.disable("datatrove")
        return super()._run_for_rank(rank, local_rank, node_rank)


def _run(
    config: PrepareConfig,
    tasks: list[Task],
    done: Callable[[Task], bool],
    title: str,
    pipeline: Callable[[list[Task], str], list[Any]],
) -> None:
    """Run the pipeline for each task, with a progress bar over the input's bytes."""
    if not tasks:
        return
    steps = pipeline(tasks, os.path.abspath(config.output))
    with _progress(tasks, done, title) as finished:
        if config.executor == "slurm":
            slurm.run(steps, len(tasks), config.output, config.slurm, finished)
            return
        datatrove_log.disable("datatrove")
        logs = tempfile.mkdtemp(dir=Path(config.output) / WORK, prefix="logs.", suffix=".tmp")
        workers = min(config.workers, len(tasks))
        _Quiet(steps, tasks=len(tasks), workers=workers, logging_dir=logs, skip_completed=False).run()
        shutil.rmtree(logs)


def _end_with_parent() -> None:
    """Let a worker end when whoever started it is gone, a second later at most."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _progress(tasks: list[Task], done: Callable[[Task], bool], title: str) -> Iterator[threading.Event]:
    """A bar that watches tasks get done, whichever process or node does them. Yields
    the event that all are."""
    stop, finished = threading.Event(), threading.Event()

    def watch() -> None:
        waiting = list(tasks)
        with bar(title, sum(task.bytes for task in tasks), "B", unit_scale=True) as drawn:
            while waiting:
                last = stop.wait(0.2)
                ready = [task for task in waiting if done(task)]
                waiting = [task for task in waiting if task not in ready]
                drawn.update(sum(task.bytes for task in ready))
                drawn.set_postfix_str(f"{len(tasks) - len(waiting)}/{len(tasks)} tasks", refresh=False)
                if last:
                    return
        finished.set()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield finished
    finally:
        stop.set()
        thread.join()


def _manifest(config: PrepareConfig, tokenizer: Tokenizer, encoding: Encoding, tasks: list[Task]) -> Manifest:
    """The manifest of the finished tasks. Raises ValueError for a domain with no text or too much damage."""
    domains = {}
    for name, source in config.domains.items():
        receipts = [_receipt(config.output, encoding.token_bytes, task) for task in tasks if task.domain == name]
        done = [receipt for receipt in receipts if receipt is not None]
        if len(done) < len(receipts):
            raise ValueError(f"domain {name!r}: {len(receipts) - len(done)} tasks left no shard; run prepare again")
        domain = Domain(
            train=tuple(receipt.train for receipt in done if receipt.train),
            held_out=tuple(receipt.held_out for receipt in done if receipt.held_out),
            source=source.path,
            licence=source.licence,
            empty=sum(receipt.empty for receipt in done),
            damaged=sum(receipt.damaged for receipt in done),
            duplicates=None if config.deduplicate == "no" else sum(receipt.duplicates for receipt in done),
        )
        domains[name] = domain
        _check(name, domain, config)
    return Manifest(
        folder=config.output,
        tokenizer=config.tokenizer,
        tokenizer_sha256=tokenizer.sha256,
        vocab=tokenizer.vocab,
        token_bytes=encoding.token_bytes,
        bos=encoding.bos,
        separator=encoding.separator,
        held_out_share=config.held_out,
        domains=domains,
    )


def _check(name: str, domain: Domain, config: PrepareConfig) -> None:
    texts = domain.documents("train") + domain.documents("held_out")
    if domain.damaged > config.damaged * (texts + domain.damaged + domain.empty):
        raise ValueError(
            f"domain {name!r}: {domain.damaged} records of {domain.source} cannot be read, more than damaged="
            f"{config.damaged} of them; repair the files or raise damaged"
        )
    if not texts and domain.duplicates:
        raise ValueError(
            f"domain {name!r}: all its {domain.duplicates} documents are copies of earlier ones; leave it out, or use "
            "deduplicate=domain to keep copies of other domains' documents"
        )
    if not texts:
        raise ValueError(f"domain {name!r}: {domain.source} holds no text in field {config.domains[name].text!r}")
    if domain.damaged or domain.empty:
        log.warning("domain %s: left out %d damaged and %d empty records", name, domain.damaged, domain.empty)
    if (config.domains[name].held_out or config.held_out) and not domain.held_out:
        log.warning(
            "domain %s: none of its %d documents is held out; raise held_out or cut long documents", name, texts
        )
    elif domain.held_out and domain.tokens("held_out") <= SHORT:
        log.warning(
            "domain %s: only %d tokens are held out, less than a window of %d; raise its held_out",
            name,
            domain.tokens("held_out"),
            SHORT,
        )
