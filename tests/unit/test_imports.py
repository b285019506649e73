"""Law 10: imports follow the arrows of docs/architecture.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What a model is, from sizes to kept units; each knows those before it.
NOUNS = ("shape", "architecture", "dims", "params", "masks", "keep")
# Which of our packages each part may import. A part may always import itself.
ARROWS = {
    "files": set(),
    "reading": set(),
    "hub": set(),
    "progress": set(),
    "quick": set(),
    "unforeseen": set(),
    "transfer": set(),
    **{noun: set(NOUNS[:place]) for place, noun in enumerate(NOUNS)} | {"keep": {*NOUNS[:-1], "transfer"}},
    "config": {"files", "reading"},
    "data": {"config", "files", "progress", "reading", "hub"},
    "pruning": {*NOUNS, "config"},
    "model": set(NOUNS),
    "parallel": {*NOUNS, "model", "config", "transfer"},
    "checkpoint": {*NOUNS, "files", "reading", "hub", "parallel"},  # parallel.agree, no more
    "train": {
        *(*NOUNS, "transfer", "files", "progress", "reading", "unforeseen", "hub", "config"),
        *("data", "pruning", "model", "parallel", "checkpoint"),
    },
    "explain": {"config"},
    "report": {"config", "reading", "train"},
    "use": {"files", "reading", "hub", "progress", "data", "checkpoint"},
    "arguments": {"explain"},  # to complete keys
    "forecast": {*NOUNS, "reading", "hub", "config", "data", "model", "parallel", "checkpoint", "train"},
    "cli": {
        *("arguments", "quick", "unforeseen", "forecast", "use", "config", "explain", "data", "parallel", "train"),
        *("checkpoint", "report"),
    },
    "__main__": {"cli"},
}
DISTRIBUTED = {"parallel", "checkpoint"}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(file: Path) -> str:
    return file.relative_to(ROOT / "shear_tron").parts[0].removesuffix(".py")


def test_imports_follow_the_arrows() -> None:
    files = [file for file in (ROOT / "shear_tron").rglob("*.py") if file.parent.name != "__pycache__"]
    assert len(files) > 30
    wrong = []
    for file in files:
        mine = part(file)
        if mine == "__init__":
            continue
        for name in imports(file):
            pieces = name.split(".")
            if pieces[0] == "shear_tron" and len(pieces) > 1 and pieces[1] not in ARROWS[mine] | {mine}:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
            if name.startswith("torch.distributed") and mine not in DISTRIBUTED:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
            if pieces[0] == "nanotron" and file.name != "nanotron.py":
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_nothing_of_ours_and_are_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for file in (ROOT / "kernels" / "shear_kernels").rglob("*.py"):
        assert not [name for name in imports(file) if name.split(".")[0] == "shear_tron"], file


def test_environment_variables_are_read_in_two_files_and_the_command_line() -> None:
    """By torchrun's (topology, cli) and by the kernels' dispatch."""
    readers = {
        str(file.relative_to(ROOT))
        for folder in ("shear_tron", "kernels/shear_kernels")
        for file in (ROOT / folder).rglob("*.py")
        if "os.environ" in file.read_text() or "getenv" in file.read_text()
    }
    assert readers <= {"shear_tron/parallel/topology.py", "kernels/shear_kernels/__init__.py"}


def test_files_are_pages() -> None:
    for folder in ("shear_tron", "kernels/shear_kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 300, file
