"""The README's picture, light and dark, from a report of heads.

`python docs/_ext/readme_picture.py` writes docs/pictures/head_light.png and head_dark.png. Each
carries the figures it shows, by which a test holds it to the report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "benchmarks" / "results" / "cpu_amd_epyc_head.json"
CASES = {"score": "no gradient", "frozen": "frozen head", "trainable": "trained head"}
NAMES = {"trl": "TRL", "eager": "eager", "torch.compile": "torch.compile", "fastpo cpu": "fastpo"}
COLOURS = {
    "light": ("#1f2328", "#59636e", ("#c9843a", "#b9bec5", "#8b949e", "#0b6e8a")),
    "dark": ("#e6edf3", "#9198a1", ("#e0a04a", "#59636e", "#7d8590", "#3fb0d0")),
}


def figures() -> dict[str, dict[str, list[float]]]:
    """Per panel and variant the three cases; of a trained head the default, which keeps."""
    rows = {(row["variant"], row["case"]): row for row in read()["rows"]}
    found: dict[str, dict[str, list[float]]] = {"extra_mib": {}, "products": {}}
    for key, values in found.items():
        for name, shown in NAMES.items():
            kept = [(name, "score"), (name, "frozen"), (name, "trainable")]
            chosen = [rows.get(at) or rows[f"{name} keep", at[1]] for at in kept]
            values[shown] = [round(row[key], 2) for row in chosen]
    return found


def read() -> dict[str, Any]:
    return json.loads(REPORT.read_text(encoding="utf-8"))


def draw(theme: str) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ink, muted, bars = COLOURS[theme]
    style = {
        "font.size": 10,
        "text.color": ink,
        "xtick.color": ink,
        "axes.edgecolor": muted,
        **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    }
    shown = figures()
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.4))
        titles = {"extra_mib": "Extra memory, MiB", "products": "Time, in bare matrix products"}
        for panel, (key, title) in zip(panels, titles.items(), strict=True):
            _panel(panel, shown[key], bars, "{:,.0f}" if key == "extra_mib" else "{:.2f}")
            panel.set_title(title, loc="left", fontweight="bold", color=ink, pad=12)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="lower left", ncols=4,
                      frameon=False, bbox_to_anchor=(0.005, -0.09))  # fmt: skip
        figure.text(0.99, -0.05, _where(), ha="right", fontsize=8.5, color=muted)
        figure.tight_layout(w_pad=3)
        out = ROOT / "docs" / "pictures" / f"head_{theme}.png"
        metadata = {"Figures": json.dumps(shown), "Software": ""}
        figure.savefig(out, dpi=130, transparent=True, bbox_inches="tight", metadata=metadata)
        pyplot.close(figure)
    return out


def _panel(panel: Any, values: dict[str, list[float]], colours: Any, form: str) -> None:
    width = 0.8 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        at = [case - 0.4 + (i + 0.5) * width for case in range(len(heights))]
        panel.bar(at, heights, width * 0.92, color=colours[i], label=name)
        for x, height in zip(at, heights, strict=True):
            panel.text(x, height, form.format(height), ha="center", va="bottom", fontsize=8)
    panel.set_xticks(range(len(CASES)), list(CASES.values()))
    panel.tick_params(length=0)
    panel.set_yticks([])


def _where() -> str:
    report = read()
    shape = report["shapes"][0]
    size = f"N {shape['tokens']:,}, V {shape['vocab']:,}, H {shape['hidden']:,}"
    return f"{size}, {report['dtype']}, {report['threads']} cores of an {report['device']}"


if __name__ == "__main__":
    for name in COLOURS:
        print(draw(name).relative_to(ROOT))
