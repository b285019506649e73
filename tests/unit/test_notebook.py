"""The notebook runs from top to bottom in a kernel of its own, and its pictures are saved in it."""

from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


@pytest.mark.slow
def test_the_notebook_runs_and_has_its_pictures(tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed; pip install '.[dev]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed; pip install '.[dev]'")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOKS / "masks.ipynb", as_version=4)
    saved = pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == saved == 3


def pictures(notebook) -> int:  # type: ignore[no-untyped-def]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)
