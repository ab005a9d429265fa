"""The notebook runs, and prints what it shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def printed(notebook: Any) -> str:
    """What its cells print; a note on stderr that kernels are compiled is no part of it."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def test_the_notebook_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    shown = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(shown)
    ran = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(ran, timeout=120, kernel_name="python3").execute(cwd=str(ROOT))
    said = printed(ran)
    lines, expected = said.splitlines(), printed(shown).splitlines()
    assert lines[0] == expected[0] and "2 of 2 linear layers converted" in lines[0]
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("step ")]
    assert len(losses) == 4 and losses[-1] < 0.2 * losses[0]  # the last digits are the machine's
    assert lines[-1] == expected[-1] and lines[-1].endswith("equal to the bit: True")
    assert NOTEBOOK.stat().st_size < 20_000
