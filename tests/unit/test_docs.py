"""What pages tell people to type: commands parse, keys, files and extras exist, and what takes a moment runs."""

import pkgutil
import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from shear_tron import cli
from shear_tron.arguments import OVERRIDABLE, VERBS, parse
from shear_tron.explain import FILES, keys
from shear_tron.forecast.known import SHAPES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
PAGES += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
SECTIONS = ("data", "train", "optimizer", "checkpoint", "log", "prune", "distill", "parallel", "init_from")
THEIRS = {"optimizer.lr", "optimizer.lag_lr"}  # keys of LLM-Shearing, next to ours


def snippets(page: Path) -> Iterator[str]:
    """Lines of blocks of code that is not Python, and code within sentences."""
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.S).replace("\\\n", " ")
    for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
        yield from block.splitlines()
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    yield from (line for line in text.splitlines() if line.startswith("    "))
    yield from re.findall(r"`([^`\n]+)`", text)


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for line in snippets(page):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a line of prose or a table
                continue
            for place, word in enumerate(words):
                if word in (">", "|", "&", "&&"):
                    words = words[:place]
                    break
            yield f"{page.relative_to(ROOT)}: {line.strip()}", words


COMMANDS = list(commands())


def ours() -> Iterator[tuple[str, list[str]]]:
    """What `shear-tron` is given, however it is started. A verb alone, in a sentence, is its name and no command."""
    for where, words in COMMANDS:
        for name, *given in (words[place:] for place in range(len(words))):
            if name in ("shear-tron", "shear_tron") and len(given) > 1 and given[0] in VERBS:
                yield where, given


OURS = list(ours())


def test_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    assert {given[0] for _, given in OURS} == {*VERBS} - {"bench"}
    wrong = []
    for where, given in OURS:
        try:
            parse(given)
        except SystemExit as stopped:
            if stopped.code:
                wrong.append(f"{where}\n  {capsys.readouterr().err.splitlines()[-1]}")
    assert not wrong, "\n".join(wrong)


def test_keys_on_pages_and_in_commands_exist() -> None:
    known = {verb: {key.name for key in keys(pkgutil.resolve_name(kind))} for verb, kind in FILES.items()}
    wrong = []
    for where, given in OURS:
        if given[0] in (*OVERRIDABLE, "plan"):
            file = given[0] if given[0] in known else "train"
            overrides = [word.split("=")[0] for word in given[1:] if "=" in word and not word.startswith("-")]
            wrong += [f"{where}: no key {key}" for key in overrides if key not in known[file]]
    for page in PAGES:
        for key in re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.0-9]+)(?:[=:][^`]*)?`", page.read_text()):
            if key not in known["train"] | THEIRS and not key.endswith((".yaml", ".sbatch")):
                wrong.append(f"{page.relative_to(ROOT)}: no key {key}")
    assert not wrong, "\n".join(wrong)


def test_what_takes_a_moment_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ran = set()
    for where, given in OURS:
        files = [word for word in given[1:] if word.endswith(".yaml")]
        there = files and all(Path(file).exists() for file in files)
        known = given[0] == "plan" and any(word in SHAPES for word in given)
        asked = given[0] == "config" and "SECTION" not in where
        if " ".join(given) not in ran and ((given[0] in ("plan", "show") and there) or known or asked):
            assert cli.main(given) == 0, f"{where}\n{capsys.readouterr().err}"
            ran.add(" ".join(given))
    capsys.readouterr()
    assert len(ran) >= 5


def test_files_named_on_pages_exist() -> None:
    folders = "shear_tron|kernels|tests|examples|unit|distributed|end_to_end"  # the last three below tests/
    named = re.compile(rf"`((?:{folders})/[\w./-]+\.(?:py|yaml|md|ipynb|sbatch))(?:::\w+)?`")
    wrong = [
        f"{page.relative_to(ROOT)}: no file {name}"
        for page in PAGES
        for name in named.findall(page.read_text())
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "tests")) and "NAME" not in name
    ]
    assert not wrong, "\n".join(wrong)


def test_targets_scripts_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wrong = []
    for where, words in COMMANDS:
        for before, word in pairwise(words):
            if before == "make" and words[0] == "make" and re.fullmatch("[a-z-]+", word) and word not in targets:
                wrong.append(f"{where}: no target {word}")
            if before.endswith(("python", "python3")) and word.endswith(".py") and not (ROOT / word).exists():
                wrong.append(f"{where}: no file {word}")
            for extras in re.findall(r"^(?:shear-tron|\.)\[([\w,-]+)\]$", word):
                wrong += [
                    f"{where}: no extra {e}" for e in extras.split(",") if e not in project["optional-dependencies"]
                ]
    assert not wrong, "\n".join(wrong)


def test_every_promise_names_a_test_that_is_there() -> None:
    """`folder/test_x.py::test_y`; `::test_y` is of the file that was named last."""
    place, found = "", 0
    for file, name in re.findall(r"`(\w+/test_\w+\.py)?(?:::(test_\w+))?`", (ROOT / "docs/reliability.md").read_text()):
        place = file or place
        if place:
            found += 1
            text = (ROOT / "tests" / place).read_text()
            assert not name or f"def {name}(" in text, f"{place}::{name}"
    assert found > 25
