"""Make the notebooks from examples/*.py: the same cells, run, with what they printed.

    python -m tests.notebooks [NAMES ...]

A notebook and its script are one source, in jupytext's percent format; tests/test_notebooks.py holds them equal. Progress and
warnings (standard error) are left out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
EXAMPLES, NOTEBOOKS = ROOT / "examples", ROOT / "notebooks"


def cells_of(script: Path) -> nbformat.NotebookNode:
    """A script's cells as a notebook without outputs."""
    notebook = jupytext.read(script)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{script.stem.replace('_', '-')}-{number}"
        cell.metadata = {}
    return notebook


def run(notebook: nbformat.NotebookNode, folder: Path, timeout: int = 3600) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in a folder; a cell that raises ends it."""
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    return notebook


def main(names: list[str]) -> None:
    for script in sorted(EXAMPLES.glob("*.py")):
        if names and script.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(cells_of(script), Path(folder))
        path = NOTEBOOKS / f"{script.stem}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main(sys.argv[1:])
