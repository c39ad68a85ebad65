"""The table of the fastest forwards, from reports of `fastpo bench head` on GPUs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ..ops.rows import fastest
from ..ops.rows.fastest import Row
from .errors import BenchError
from .report import Report, read

# What may be chosen between; the first where nothing is faster.
BACKENDS = ("triton", "anchored", "cutlass", "cuda")


def choose(reports: list[Path], table: Path) -> list[Row]:
    """Rows of the reports, written into `table` in place of older ones of the same head."""
    found = [row for path in reports for row in rows_of(read(path), path)]
    kept = {_key(row): row for row in [*fastest.read(table), *found]}
    rows = [kept[key] for key in sorted(kept)]
    table.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return found


def rows_of(report: Report, path: Path) -> list[Row]:
    """One for each hidden size that was measured."""
    if report["what"] != "head" or report["device_type"] != "cuda":
        raise BenchError(f"{path}: expected a report of `fastpo bench head` on a GPU")
    sizes = sorted({row["hidden"] for row in report["rows"]})
    return [row for size in sizes if (row := _verdict(report, size, path.name)) is not None]


def _verdict(report: Report, hidden: int, name: str) -> Row | None:
    """None where Triton, which all are compared with, was not timed."""
    timed = {backend: _products(report["rows"], hidden, backend) for backend in BACKENDS}
    cells = set(timed[BACKENDS[0]])
    if not cells:
        return None
    # One that failed anywhere, or is not as exact as it must be, is out.
    means = {
        backend: round(statistics.fmean(products[cell] for cell in cells), 3)
        for backend, products in timed.items()
        if cells <= set(products)
    }
    return {
        "device": report["device"],
        "dtype": report["dtype"],
        "hidden": hidden,
        "backend": min(means, key=lambda backend: means[backend]),
        "products": means,
        "report": name,
    }


def _products(rows: list[dict[str, Any]], hidden: int, backend: str) -> dict[tuple, float]:
    """Of a backend, by shape, case and what is kept for the backward."""
    own, found = f"fastpo {backend}", {}
    for row in rows:
        ours = row["variant"].split()[:2] == own.split() and row["hidden"] == hidden
        if ours and row["status"] == "ok" and "products" in row:
            kept = row["variant"].removeprefix(own)
            found[row["tokens"], row["vocab"], row["case"], kept] = row["products"]
    return found


def _key(row: Row) -> tuple[str, str, int]:
    return row["device"], row["dtype"], row["hidden"]
