"""The notebooks run from their first cell to the last, and show what they show."""

from __future__ import annotations

import pytest
from _blocks import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    """What is printed is what is stored, figures apart; pictures are as many."""
    import notebooks

    stored = nbformat.read(path, as_version=4)
    found = [shown(cell) for cell in notebooks.executed(path).cells]
    assert found == [shown(cell) for cell in stored.cells], "run: python docs/_ext/notebooks.py"


def shown(cell) -> list[str]:
    outputs = cell.get("outputs", [])
    return ["".join(c for c in o.get("text", o.output_type) if c.isalpha()) for o in outputs]


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["objectives", "quickstart"]
