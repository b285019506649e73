"""Code on pages runs as printed, and links lead somewhere."""

import ast
import re
from pathlib import Path
from typing import get_args

import pytest

from shear_tron.checkpoint.model_folder import Format
from shear_tron.checkpoint.nanotron_config import Flavour

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_code_on_pages_runs(page: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    exec(compile(code, page, "exec"), {})


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "kernels" / "README.md"):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"


def test_families_take_as_many_lines_as_told() -> None:
    """docs/extending.md counts a family's lines from its heading to the next."""
    source = (ROOT / "shear_tron" / "checkpoint" / "families.py").read_text()
    sections = [section.strip() for section in re.split(r"^(?=# --- |FAMILIES)", source, flags=re.M)]
    counted = {
        name: str(len(text.splitlines())) for text in sections for name in re.findall(r"^_(\w+) = Family", text, re.M)
    }
    told = dict(re.findall(r"^\| (\w+) \| (\d+)", (ROOT / "docs" / "extending.md").read_text(), re.M))
    assert len(told) == 5
    assert told == {name: counted[name] for name in told}


def test_every_tick_of_the_table_of_formats_is_a_test_that_ci_runs() -> None:
    table = README.split("## Formats")[1].split("\n## ")[0]
    ticks = re.findall(r"\[✓\]\(([^)#]+)#(\w+)\)", table)
    assert len(ticks) == table.count("✓") > 10
    for file, name in ticks:
        tests = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        (test,) = [node for node in tests if node.name == name]
        text = ast.unparse(test)
        assert not re.search("rehearsal|skip|xfail|mark.gpu", text), f"{file}: {name} is not run by everybody"


def test_the_table_of_formats_has_every_format() -> None:
    rows = re.findall(r"^\| (.*?) \|", README.split("## Formats")[1].split("\n## ")[0], re.M)
    named = " ".join(rows).lower().replace(" ", "")
    for form in get_args(Format):
        assert form in named
    for flavour in get_args(Flavour):
        assert f"nanotron{flavour}" in named
