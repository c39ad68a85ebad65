"""Pictures of reports: time and memory against tokens, vocabulary and context."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..demo.plot import FASTPO, STYLE
from .errors import BenchError
from .report import Report, read, where

CASES = {"score": "no gradient", "frozen": "frozen head", "trainable": "trained head"}
FLOOR = "#8a8a8a"
# Of fastpo's backends darker and lighter, the others apart from them and from each other.
_OWN = (FASTPO, "#3fa7c4", "#8fd0e0", "#0a4f63", "#2f6f5e", "#7dbb9b")
_OTHERS = (
    "#e0a04a",
    "#b5533c",
    "#7b5ea7",
    "#5b8c5a",
    "#c77daa",
    "#a08f2e",
    "#4d6fb3",
    "#d98880",
    "#6d6d6d",
)
Rows = list[dict[str, Any]]
Value = Callable[[dict[str, Any]], float | None]


def draw(path: Path, folder: Path) -> Path:
    """The PNG of one report, of the same name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A dollar sign in a name would begin a formula.
    report = json.loads(json.dumps(read(path)).replace("$", r"\\$"))
    pictures = {"head": _head, "step": _step, "shared": _shared}
    if report["what"] not in pictures:
        kinds = ", ".join(pictures)
        raise BenchError(f"{path}: expected a report of {kinds}, got {report['what']}")
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{path.stem}.png"
    with pyplot.rc_context(STYLE):
        try:
            figure = pictures[report["what"]](report, pyplot)
        except BenchError as error:
            raise BenchError(f"{path}: {error}") from None
        title = f"{where(report)}, {report['dtype']}, {report['created'][:10]}"
        figure.suptitle(title, x=0.012, ha="left", fontsize=10, color="#5c5c5c")
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        figure.savefig(out, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
    return out


def colours(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """One for each variant, the same in every panel."""
    own: dict[str, str] = {}
    others: dict[str, str] = {}
    for row in rows:
        mine = row.get("own", "fastpo" in row["variant"])
        table, palette = (own, _OWN) if mine else (others, _OTHERS)
        table.setdefault(row["variant"], palette[len(table) % len(palette)])
    return own | others


def _walks(rows: Rows) -> list[tuple[str, str, Rows]]:
    """Rows along N at one head, or along V at one N and H: (title, axis, rows); else all heads."""
    walks = []
    for axis, rest in {"tokens": ("vocab", "hidden"), "vocab": ("tokens", "hidden")}.items():
        groups: dict[tuple, Rows] = defaultdict(list)
        for row in rows:
            groups[tuple(row[name] for name in rest)].append(row)
        for sizes, members in groups.items():
            if len({row[axis] for row in members}) > 1:
                letters = {"tokens": "N", "vocab": "V", "hidden": "H"}
                parts = zip(rest, sizes, strict=True)
                title = ", ".join(f"{letters[name]} {size:,}" for name, size in parts)
                walks.append((title, axis, members))
    return walks


def _head(report: Report, pyplot: Any) -> Any:
    rows = [row for row in report["rows"] if "median_ms" in row]
    if not rows:
        raise BenchError("expected a report with times, got one without")
    walks = _walks(rows)
    if not walks:
        return _head_bars(rows, pyplot)
    panels = _panels(rows)
    height = len(panels) * len(walks)
    figure, axes = pyplot.subplots(height, 3, figsize=(15, 3.6 * height), squeeze=False)
    palette = colours(rows)
    for i, (title, axis, members) in enumerate(walks):
        for j, (case, name) in enumerate(CASES.items()):
            of_case = [row for row in members if row["case"] == case]
            for k, (label, value) in enumerate(panels):
                panel = axes[len(panels) * i + k][j]
                _curves(panel, of_case, axis, value, palette)
                panel.set_title(f"{name}, {title}")
                panel.set_ylabel(label)
            _floor(axes[len(panels) * i][j], report, of_case, case, axis)
    _legend(figure, palette | {"bare products": FLOOR}, 3.6 * height)
    return figure


def _panels(rows: Rows) -> list[tuple[str, Value]]:
    time: tuple[str, Value] = ("time, ms", lambda row: row["median_ms"])
    memory: tuple[str, Value] = ("extra memory, MiB", lambda row: row.get("extra_mib"))
    return [time, memory] if any("extra_mib" in row for row in rows) else [time]


def _legend(figure: Any, palette: dict[str, str], inches: float) -> None:
    """Below the panels: inside them it would hide lines."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, lw=2) for colour in palette.values()]
    below = -0.02 / inches
    place = {"loc": "upper left", "bbox_to_anchor": (0.03, below), "ncols": 7, "fontsize": 9}
    figure.legend(lines, list(palette), **place)


def _curves(panel: Any, rows: Rows, axis: str, value: Value, palette: dict[str, str]) -> None:
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        y = value(row)
        if y is not None:
            lines[row["variant"]].append((row[axis], max(y, 0.1)))
    for name, points in lines.items():
        x, ys = zip(*sorted(points), strict=True)
        own = name.startswith("fastpo")
        panel.plot(x, ys, "o-", ms=3, lw=2 if own else 1, color=palette[name], label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel({"tokens": "tokens N", "vocab": "vocabulary V", "length": "context"}[axis])
    panel.grid()


def _floor(panel: Any, report: Report, rows: Rows, case: str, axis: str) -> None:
    sizes = {(row["tokens"], row["vocab"], row["hidden"]) for row in rows}
    points = sorted(
        (shape[axis], shape["floor_ms"][case])
        for shape in report["shapes"]
        if (shape["tokens"], shape["vocab"], shape["hidden"]) in sizes
    )
    if points:
        panel.plot(*zip(*points, strict=True), ":", color=FLOOR, label="bare products")


def _head_bars(rows: Rows, pyplot: Any) -> Any:
    """Shapes that make no walk: products-equivalents of each."""
    shapes = sorted({(row["tokens"], row["vocab"], row["hidden"]) for row in rows})
    bars = Counter((row["tokens"], row["vocab"], row["hidden"], row["case"]) for row in rows)
    longest = max(bars.values())
    size = (15, max(3.0, 0.26 * longest) * len(shapes) + 0.8)
    figure, axes = pyplot.subplots(len(shapes), 3, figsize=size, squeeze=False)
    palette = colours(rows)
    for i, shape in enumerate(shapes):
        for j, (case, name) in enumerate(CASES.items()):
            here = [r for r in rows if (r["tokens"], r["vocab"], r["hidden"]) == shape]
            shown = sorted((r for r in here if r["case"] == case), key=lambda r: -r["products"])
            names = [row["variant"] for row in shown]
            heights = [row["products"] for row in shown]
            axes[i][j].barh(names, heights, color=[palette[n] for n in names])
            for y, height in enumerate(heights):
                axes[i][j].text(height, y, f" {height:.2f}", va="center", fontsize=8)
            axes[i][j].axvline(list(CASES).index(case) + 1, color=FLOOR, lw=1, ls=":")
            axes[i][j].set_title(f"{name}, N {shape[0]:,}, V {shape[1]:,}, H {shape[2]:,}")
            axes[i][j].set_xlabel("products of 2·N·H·V")
    return figure


def _step(report: Report, pyplot: Any) -> Any:
    rows = [row for row in report["rows"] if row.get("status") == "ok"]
    if not rows:
        raise BenchError("expected a report with times, got one without")
    palette = colours([*rows, *report["fits"]])
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4.2))
    for panel, label, key in (
        (axes[0], "time of a step, s", "median_s"),
        (axes[1], "memory of a step, MiB", "extra_mib"),
    ):
        _curves(panel, rows, "length", lambda row, key=key: row[key], palette)  # type: ignore[misc]
        panel.set_title(f"{report['model']['name']}, {rows[0]['pairs']} pairs")
        panel.set_ylabel(label)
    axes[0].legend(fontsize=8)
    _fits(axes[2:], report, palette)
    return figure


def _shared(report: Report, pyplot: Any) -> Any:
    """Bars of every variant for each kind of batch."""
    rows = [row for row in report["rows"] if row.get("status") == "ok"]
    if not rows:
        raise BenchError("expected a report with times, got one without")
    palette = colours([*rows, *report["fits"]])
    panels = [["median_s"] * 2, ["extra_mib"] * 2, ["length", "pairs"]]
    figure, axes = pyplot.subplot_mosaic(panels, figsize=(14, 11))
    _groups(axes["median_s"], rows, "median_s", palette)
    axes["median_s"].set_ylabel("time of a step, s")
    axes["median_s"].set_title(f"{report['model']['name']}, prompt : completion, pairs × length")
    _groups(axes["extra_mib"], rows, "extra_mib", palette)
    axes["extra_mib"].set_ylabel("memory of a step, MiB")
    _fits([axes["length"], axes["pairs"]], report, palette)
    _legend(figure, palette, 11)
    return figure


def _groups(panel: Any, rows: Rows, key: str, palette: dict[str, str]) -> None:
    """A group of bars for each kind of batch, a bar for each variant."""
    names = [f"{row['texts']}\n{row['pairs']} × {row['length']}" for row in rows]
    cases = list(dict.fromkeys(names))
    width = 0.85 / len(palette)
    for name, row in zip(names, rows, strict=True):
        at = cases.index(name) + (list(palette).index(row["variant"]) + 0.5) * width - 0.425
        panel.bar(at, row[key], width, color=palette[row["variant"]])
    panel.set_xticks(range(len(cases)), cases, fontsize=8)
    panel.grid(axis="y")
    panel.set_axisbelow(True)


def _fits(panels: Any, report: Report, palette: dict[str, str]) -> None:
    """Two panels: the longest context, the biggest batch."""
    titles = {"length": "longest context", "pairs": "biggest batch"}
    for panel, (of, title) in zip(panels, titles.items(), strict=True):
        fits = [fit for fit in report["fits"] if fit["of"] == of]
        if not fits:
            panel.set_axis_off()
        panel.set_title(f"{title}, {fits[0]['limit_mib']:,} MiB" if fits else "")
        for x, fit in enumerate(fits):
            more = "+" if fit["at_limit"] else ""
            panel.bar(x, fit["largest"], color=palette[fit["variant"]])
            panel.text(x, fit["largest"], f"{fit['largest']:,}{more}", ha="center", va="bottom")
        names = [fit["variant"].replace(" + ", "\n+ ") for fit in fits]
        panel.set_xticks(range(len(names)), names)
