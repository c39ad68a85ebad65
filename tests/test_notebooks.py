"""The notebooks run from their first cell to the last, and show what they show."""

from __future__ import annotations

import pytest
from _blocks import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    """What is printed is what is stored, figures apart; pictures are as many."""
    from nbclient import NotebookClient

    stored = nbformat.read(path, as_version=4)
    found = nbformat.read(path, as_version=4)
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(found, timeout=120, resources=where).execute()
    assert [shown(cell) for cell in found.cells] == [shown(cell) for cell in stored.cells]


def shown(cell) -> list[str]:
    outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
    return ["".join(c for c in o.get("text", o.output_type) if c.isalpha()) for o in outputs]


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["objectives", "quickstart"]
