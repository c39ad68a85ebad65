"""`python docs/_ext/notebooks.py` runs the notebooks of examples/ and stores what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"


def executed(path: Path) -> Any:
    """Run from the first cell to the last; without times and what went to the error stream."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs = []
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, record_timing=False, resources=where).execute()
    for cell in code:
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        found = executed(path)
        found.metadata.pop("language_info", None)  # names this Python
        nbformat.write(found, path)
