"""Models and tokenizers by their Hub id: fetched once into the cache of huggingface_hub, then folders like others.

    hf://org/name, hf://org/name@revision     always the Hub
    org/name                                  the Hub too, unless there is a folder of that name, or a folder ``org``

The last rule keeps a mistyped ``models/big`` from becoming a download: it stays a folder that is not there. What the
cache has is used without asking the network, so that all ranks and all runs of a machine read the same; a revision
pins it.
"""

import re
import shlex
from pathlib import Path

SCHEME = "hf://"
# Text, tokenizers and safetensors. Pickles (.bin, .pt, .pth) are in neither list and are never fetched.
SMALL = (
    "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md", "LICEN[SC]E*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
WEIGHTS = (*SMALL, "*.safetensors")
# Of these, what is left out: copies of a model in other formats, which folders of the Hub hold beside it.
EXCLUDED = ("*/*", "consolidated*")
_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_NAME}/)?{_NAME}")


def located(given: str, weights: bool = False, fetch: bool = True) -> str:
    """The folder that ``given`` stands for: itself if it is a path, else where its files are in the cache.

    weights: with them, else only what is small enough to look at before deciding. fetch: False looks in the cache
    alone, and returns ``given`` where it lacks the files. ValueError in one line for what cannot be fetched.
    """
    if not is_id(given):
        return given
    name, _, revision = given.removeprefix(SCHEME).partition("@")
    try:
        return _snapshot(name, revision or None, weights, local=True)
    except (OSError, ValueError):  # not there, or not whole
        if not fetch:
            return given
    try:
        return _snapshot(name, revision or None, weights, local=False)
    except Exception as error:  # of the network, of the Hub, of the disk: whatever it is, it is not here
        by_hand = _command(name, revision, weights)
        raise ValueError(
            f"{given} is no folder here, and {name} cannot be fetched from the Hub ({_reason(error)}); give a folder "
            f"that exists, or where there is a network run: {by_hand} --local-dir FOLDER, and give that FOLDER"
        ) from None


def is_id(given: str) -> bool:
    """Whether ``given`` names a model of the Hub and not a path."""
    if given.startswith(SCHEME):
        if not _ID.fullmatch(given.removeprefix(SCHEME).partition("@")[0]):
            raise ValueError(f"{given} is no Hub id; write {SCHEME}org/name, or {SCHEME}org/name@revision")
        return True
    name = given.partition("@")[0]
    owner = name.partition("/")[0]
    is_file = name.endswith((".json", ".model"))
    is_name = bool(_ID.fullmatch(name)) and "/" in name and not is_file
    return is_name and not Path(given).exists() and not Path(owner).exists()


def _snapshot(name: str, revision: str | None, weights: bool, local: bool) -> str:
    """Ranks that fetch the same file at the same time wait for one another: huggingface_hub locks every file."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        name,
        revision=revision,
        allow_patterns=list(WEIGHTS if weights else SMALL),
        ignore_patterns=list(EXCLUDED),
        local_files_only=local,
    )
    if weights and not any(Path(folder).glob("*.safetensors")):
        raise ValueError("it has no safetensors, and pickled weights are never loaded")
    return str(folder)


def _command(name: str, revision: str, weights: bool) -> str:
    """What fetches the same files by hand. Its options take one pattern each."""
    options = [("revision", revision)] if revision else []
    options += [("include", pattern) for pattern in (WEIGHTS if weights else SMALL)]
    options += [("exclude", pattern) for pattern in EXCLUDED]
    return " ".join(["hf", "download", name, *(f"--{key} {shlex.quote(value)}" for key, value in options)])


def _reason(error: Exception) -> str:
    """What went wrong at the bottom, in one short line: huggingface_hub wraps it in paragraphs."""
    root = error.__cause__ or error
    said = " ".join(str(root).split())
    return f"{type(root).__name__}: {said[:160]}" if said else type(root).__name__
