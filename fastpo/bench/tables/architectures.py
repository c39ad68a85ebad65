"""Which types of models were compared, and what of fastpo serves each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_NUMBER = re.compile(r"\d[\d.]*(e[+-]?\d+)?")
_Group = tuple[str, str, str]


def architectures(report: dict[str, Any]) -> Iterator[str]:
    """A row for all types that are served alike."""
    built = [row for row in report["rows"] if row["model"] == "built"]
    largest = max((row["largest"] for row in built), default=0)
    yield (
        f"{len(built)} of {len(report['rows'])} types of transformers "
        f"{report['versions']['transformers']}, float32; largest difference {largest:.0e} of the "
        "largest gradient:"
    )
    yield ""
    yield "| lazy logits | `attach` | shared prompts | types |"
    yield "| --- | --- | --- | --- |"
    groups: dict[_Group, list[str]] = {}
    for row in built:
        groups.setdefault(_served(row), []).append(row["type"])
    for served, types in sorted(groups.items(), key=lambda x: (-len(x[1]), x[1])):
        yield f"| {' | '.join(served)} | {', '.join(types)} |"
    others = [row["type"] for row in report["rows"] if row["model"] != "built"]
    if others:
        yield f"| not compared | | | {', '.join(others)} |"


def _served(row: dict[str, Any]) -> _Group:
    return _told(row["lazy"], "no"), _told(row["attach"], "refused"), _told(row["shared"])


def _told(found: str, short: str | None = None) -> str:
    """short: in place of a long reason."""
    if found == "same" or found.startswith("differs"):
        return "yes" if found == "same" else found
    return short or _NUMBER.sub("…", found)
