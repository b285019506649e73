"""A hook of mkdocs: the site is the repository's pages at their own places, so their links are its links.

Pages are README, docs and whatever else the nav of mkdocs.yml names. What they link to comes along: files as they are,
folders as a page that shows what is in them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
SHOWN = {".py": "python", ".yaml": "yaml", ".json": "json", ".sbatch": "bash", "": "text"}


def on_files(files: Files, config: Any) -> Files:
    for file in list(files):
        if file.abs_src_path and Path(file.abs_src_path).is_relative_to(ROOT / "docs"):
            files.remove(file)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / name for name in _named(config.nav))]
    there = {path for page in pages for path in _linked(page)} | set(pages)
    for path in sorted(there):
        where = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            listed = File.generated(config, f"{where}/index.md", content=_listing(path))
            listed.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(listed)
        else:
            files.append(File(where, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a folder leads to its page."""
    here = (ROOT / page.file.src_uri).parent

    def of_folder(link: re.Match[str]) -> str:
        target = here / link[0]
        if not target.is_dir():
            return link[0]
        return f"{link[0].rstrip('/')}/{'README.md' if (target / 'README.md').exists() else 'index.md'}"

    return LINK.sub(of_folder, markdown)


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _named(inner)


def _linked(page: Path) -> Iterator[Path]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in LINK.findall(text):
        target = (page.parent / link).resolve()
        if target.is_dir() and (target / "README.md").exists():
            target /= "README.md"
        if target.exists():  # mkdocs says what does not
            yield target


def _listing(folder: Path) -> str:
    parts = [f"# {folder.relative_to(ROOT)}"]
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in SHOWN:
            parts += [f"## {path.name}", f"```{SHOWN[path.suffix]}\n{path.read_text().rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"
