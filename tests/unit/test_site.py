"""The site builds, and every link and anchor of its pages leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; pip install '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config("mkdocs.yml", strict=True, site_dir=str(tmp_path)))
    pages = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    assert {"index.html", "docs/tutorial.html", "examples/smollm2/index.html", "kernels/index.html"} <= pages
    assert all("http" not in script for page in tmp_path.rglob("*.html") for script in _scripts(page.read_text()))


def _scripts(text: str) -> list[str]:
    """What a page loads before it is shown."""
    return re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']([^"']+)""", text)
