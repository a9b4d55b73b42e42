"""The notebooks are their scripts, run: the same cells, with outputs; and both run today."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.notebooks import EXAMPLES, NOTEBOOKS, cells_of, run

SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def test_each_has_its_twin() -> None:
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert len(SCRIPTS) == 3


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_script(script: Path) -> None:
    """And what they printed; none failed."""
    notebook: Any = nbformat.read(NOTEBOOKS / f"{script.stem}.ipynb", as_version=4)
    nbformat.validate(notebook)
    mine = [(cell.cell_type, cell.source) for cell in cells_of(script).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == mine, "run: make notebooks"
    printed = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(printed) >= 4
    assert not [output for output in printed if output.output_type == "error"]


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two training steps; whatever a cell raises ends it."""
    monkeypatch.setenv("REALIGNER_EXAMPLE_STEPS", "2")
    ran = run(cells_of(script), tmp_path, timeout=900)
    assert all(cell.execution_count for cell in ran.cells if cell.cell_type == "code")


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_example_runs_as_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "REALIGNER_EXAMPLE_STEPS", "2")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / "start.py"))
    assert names["run"].record["steps_done"] == 2
