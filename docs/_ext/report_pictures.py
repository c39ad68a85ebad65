"""Bars of a report, where a page says `<!-- plot: ../benchmarks/results/NAME.json -->`.

SVG in the page: its colours are the page's. A figure is the report's, to as many digits as in the
tables.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
_PLACE = re.compile(r"^<!-- plot: (\S+) -->$", re.M)
_WIDTH, _LABEL, _VALUE, _BAR, _GAP = 480, 150, 60, 13, 9
Report = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """Bars of each row, one for a series; None where there is none."""

    title: str
    form: str
    rows: dict[str, dict[str, float | None]]


def added(text: str) -> str:
    return _PLACE.sub(lambda found: _figure(DOCS / found[1]), text)


def _figure(path: Path) -> str:
    report = json.loads(path.read_text(encoding="utf-8"))
    panels = list(_KINDS[report["what"]](report))
    series = list(dict.fromkeys(name for p in panels for row in p.rows.values() for name in row))
    legend = " ".join(
        f'<span class="key {_colour(name, series)}">{html.escape(name)}</span>' for name in series
    )
    shown = "".join(_svg(panel, series) for panel in panels)
    return f'<figure class="bars"><div>{shown}</div><figcaption>{legend}</figcaption></figure>'


def _colour(name: str, series: list[str]) -> str:
    """fastpo's own in the accent, TRL in the same colour everywhere."""
    own = [n for n in series if _own(n)]
    others = sorted((n for n in series if not _own(n)), key=lambda n: n.lower() != "trl")
    return f"own{own.index(name)}" if name in own else f"other{others.index(name)}"


def _own(name: str) -> bool:
    return "fastpo" in name or name == "lazy logits"


def _svg(panel: Panel, series: list[str]) -> str:
    longest = max(v for row in panel.rows.values() for v in row.values() if v is not None) or 1
    scale = (_WIDTH - _LABEL - _VALUE) / longest
    parts, y = [f'<text class="title" x="0" y="14">{html.escape(panel.title)}</text>'], 26
    for label, row in panel.rows.items():
        middle = y + _BAR * len(row) / 2 + 4
        parts.append(f'<text class="label" x="{_LABEL - 8}" y="{middle:g}">{label}</text>')
        for name, value in row.items():
            if value is not None:
                width = max(value * scale, 1)
                parts.append(
                    f'<rect class="{_colour(name, series)}" x="{_LABEL}" y="{y}" '
                    f'width="{width:.1f}" height="{_BAR - 2}"/>'
                    f'<text class="value" x="{_LABEL + width + 4:.1f}" y="{y + 10}">'
                    f"{panel.form.format(value)}</text>"
                )
            y += _BAR
        y += _GAP
    return f'<svg viewBox="0 0 {_WIDTH} {y}" role="img">{"".join(parts)}</svg>'


def _head(report: Report) -> Iterator[Panel]:
    cases = {"score": "no gradient", "frozen": "frozen head", "trainable": "trained head"}
    own = {f"fastpo {report['backend']}{mode}": name for mode, name in _MODES.items()}
    for title, key, form in (
        ("extra memory, MiB", "extra_mib", "{:,.0f}"),
        ("time, bare products", "products", "{:.2f}"),
    ):
        rows: dict[str, dict[str, float | None]] = {name: {} for name in cases.values()}
        for row in report["rows"]:
            if not row["own"] or row["variant"] in own:
                shown = own.get(row["variant"], row["variant"])
                rows[cases[row["case"]]][shown] = row[key]
        yield Panel(title, form, rows)


_MODES = {"": "fastpo", " keep": "fastpo", " lean": "fastpo, nothing kept"}


def _step(report: Report) -> Iterator[Panel]:
    for title, key, form in (
        ("memory of the step, MiB", "extra_mib", "{:,.0f}"),
        ("time of a step, s", "median_s", "{:.2f}"),
    ):
        rows: dict[str, dict[str, float | None]] = {}
        for row in report["rows"]:
            size = f"{row['pairs']} pairs × {row['length']:,}"
            rows.setdefault(size, {})[row["variant"]] = row.get(key)
        yield Panel(title, form, rows)


def _trainers(report: Report) -> Iterator[Panel]:
    for title, key, form in (("memory, MiB", "mib", "{:,.0f}"), ("step, s", "step_s", "{:.1f}")):
        rows: dict[str, dict[str, float | None]] = {}
        for row in report["rows"]:
            name = "TRL + fastpo" if row["patched"] else "TRL"
            rows.setdefault(row["trainer"], {})[name] = row[key]
        yield Panel(title, form, rows)


def _frameworks(report: Report) -> Iterator[Panel]:
    plain = report["framework"]
    for title, key, form in (("memory, MiB", "mib", "{:,.0f}"), ("step, s", "step_s", "{:.1f}")):
        rows: dict[str, dict[str, float | None]] = {
            row["case"]: {plain: row["plain"][key], f"{plain} + fastpo": row["fastpo"][key]}
            for row in report["rows"]
        }
        yield Panel(f"{plain}, {title}", form, rows)


def _lazy(report: Report) -> Iterator[Panel]:
    names = {"own": "the model's logits", "lazy": "lazy logits"}
    for title, key, form in (
        ("memory, MiB", "extra_mib", "{:,.0f}"),
        ("CPU time, s", "cpu_s", "{:.1f}"),
    ):
        rows: dict[str, dict[str, float | None]] = {}
        for row in report["rows"]:
            rows.setdefault(row["reading"], {})[names[row["logits"]]] = row[key]
        yield Panel(title, form, rows)


def _primitives(report: Report) -> Iterator[Panel]:
    names = {"fused": "fastpo", "materialised": "with logits"}
    rows: dict[str, dict[str, float | None]] = {}
    for row in report["rows"]:
        if row["mode"] == "trainable":
            rows.setdefault(row["primitive"], {})[names[row["form"]]] = row["extra_mib"]
    yield Panel("memory of forward and backward, MiB", "{:,.0f}", rows)


def _contexts(report: Report) -> Iterator[Panel]:
    names = {"trl": "TRL", "fastpo": "TRL + fastpo"}
    for model in report["models"]:
        rows: dict[str, dict[str, float | None]] = {}
        for row in report["rows"]:
            if row["model"] == model["name"]:
                rows.setdefault(row["way"], {})[names[row["head"]]] = row["context"]
        title = f"{model['name']}, {model['card']}: longest context"
        yield Panel(title, "{:,.0f}", rows)


def _sampler(report: Report) -> Iterator[Panel]:
    for title, key, form in (
        ("mean ratio", "mean", "{:.3f}"),
        ("tokens outside [0.9, 1.1]", "outside", "{:.1%}"),
    ):
        yield Panel(title, form, {row["over"]: {"fastpo": row[key]} for row in report["rows"]})


def _supports(report: Report) -> Iterator[Panel]:
    names = {"few_s": "fastpo, one by one", "many_s": "fastpo, in tiles", "plain_s": "all words"}
    for trained in (True, False):
        rows: dict[str, dict[str, float | None]] = {
            f"{row['words']:,} words": {name: row[key] for key, name in names.items()}
            for row in report["rows"]
            if row["trained"] is trained
        }
        head = "trained" if trained else "frozen"
        yield Panel(f"{head} head, CPU time, s", "{:.3g}", rows)


_KINDS = {
    "head": _head,
    "step": _step,
    "trainers": _trainers,
    "frameworks": _frameworks,
    "lazy logits": _lazy,
    "primitives": _primitives,
    "plan contexts": _contexts,
    "sampler": _sampler,
    "supports": _supports,
}
