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
    """What was printed, in however many messages it came, then the kinds of other outputs."""
    outputs = cell.get("outputs", [])
    printed = "".join(output.get("text", "") for output in outputs)
    others = [output.output_type for output in outputs if output.output_type != "stream"]
    return ["".join(c for c in printed if c.isalpha()), *others]


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["objectives", "quickstart"]
