"""Every key is explained where it is defined, and docs/config.md says what the code says."""

import pkgutil
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from shear_tron import cli
from shear_tron.explain import FILES, explain, keys, markdown

ROOT = Path(__file__).parents[2]


class Inner(BaseModel):
    """The inner section.

    More of it.
    """

    depth: float | None = Field(None, ge=0, lt=1)  # how deep


class Base(BaseModel):
    # said above,
    # on two lines
    size: int = 3


class Outer(Base):
    """A file."""

    bare: bool = True
    name: str  # beside
    inner: Inner = Inner()
    many: dict[str, Inner] = {}  # by name


def test_comments_beside_and_above_explain() -> None:
    found = {key.name: (key.takes, key.default, key.meaning) for key in keys(Outer)}
    assert found == {
        "size": ("whole number", "3", "said above, on two lines"),
        "bare": ("true or false", "true", ""),
        "name": ("text", None, "beside"),
        "inner": ("section", "its keys' own", "The inner section."),
        "inner.depth": ("number >= 0, < 1", "none", "how deep"),
        "many": ("{name: section}", "{}", "by name"),
        "many.NAME.depth": ("number >= 0, < 1", "none", "how deep"),
    }


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_explained(file: str) -> None:
    bare = [key.name for key in keys(pkgutil.resolve_name(FILES[file])) if not key.meaning]
    assert not bare, f"write a comment beside the field of {bare}"


def test_the_page_is_the_code() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == markdown() + "\n", "run: python -m shear_tron config --markdown > docs/config.md"


def test_a_key_a_section_and_a_misspelling(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--explain", "prune.warmup_steps"]) == 0
    assert "prune.warmup_steps: whole number >= 0; required" in capsys.readouterr().out
    assert "prune.target.hidden" in explain("prune")
    assert "train.steps" not in explain("prune")
    assert "where" in explain("prepare.domains")
    assert cli.main(["config", "train.step"]) == 2
    assert "the nearest is 'train.steps'" in capsys.readouterr().err
