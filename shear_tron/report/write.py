"""The verb: read runs, write the page and, where wanted, pictures."""

from pathlib import Path

from shear_tron.config import ConfigError
from shear_tron.report.story import read


def write(runs: list[Path], baselines: list[Path], output: str | None, png: str | None) -> list[Path]:
    """Write the report of ``runs``. Returns the files. Raises ValueError where a folder tells nothing."""
    story = read(runs, baselines)
    try:
        from shear_tron.report.page import render
        from shear_tron.report.pictures import pictures
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install 'shear-tron[report]'") from None
    page = Path(output) if output else runs[-1] / "report.html"
    page.write_text(render(story))
    return [page, *(pictures(story, Path(png)) if png else [])]
