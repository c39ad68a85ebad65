"""What long runs left: memory early and late, and how far curves were apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def soak(report: dict[str, Any]) -> Iterator[str]:
    yield f"One thread of an {report['device']} ({report['capability']}), {report['dtype']}:"
    yield ""
    yield "| | times | resident at a tenth | at the end | largest difference of losses |"
    yield "| --- |" + " --- |" * 4
    for row in report["rows"]:
        memory = [f"{row[x]:,.1f} MiB" if x in row else "–" for x in ("early_mib", "late_mib")]
        losses = f"{row['difference']:.1e}" if row.get("difference") else "–"
        same = "none" if row.get("difference") == 0 else losses
        yield f"| {row['part']} | {row['times']:,} | {' | '.join(memory)} | {same} |"
