"""Beside each objective of a margin a picture of loss and gradient, as `fastpo.curves` has it.

Two panels of one SVG in the page, whose colours are the page's.
"""

from __future__ import annotations

import math
import re

from fastpo.curves import axis_of, curve, is_judged

_ENTRY = re.compile(r"^### (\w+)\n(?:(?!^### ).)*?(?=^```text$)", re.M | re.S)
_WIDTH, _HEIGHT, _LEFT, _TOP, _STEP = 230, 96, 56, 22, 300


def added(text: str) -> str:
    """A picture before the text of each entry that has a margin."""
    return _ENTRY.sub(lambda found: found[0] + picture(found[1]), text)


def picture(key: str) -> str:
    """Empty for an objective that is no function of one."""
    try:
        axis = axis_of(key)
    except ValueError:
        return ""
    answers = {"good answer": True, "bad answer": False} if is_judged(key) else {"": True}
    found = {name: curve(key, good=good) for name, good in answers.items()}
    values = {name: line.values for name, line in found.items()}
    slopes = {name: line.gradients for name, line in found.items()}
    parts = _panel("loss", axis.end, values, 0) + _panel("gradient", axis.end, slopes, _STEP)
    colours = ("own0", "other0")
    keys = " ".join(
        f'<span class="key {colour}">{name}</span>'
        for name, colour in zip(found, colours, strict=False)
        if name
    )
    size = f"0 0 {_STEP + _LEFT + _WIDTH + 8} {_TOP + _HEIGHT + 18}"
    return (
        f'<figure class="curve"><svg viewBox="{size}" role="img">{"".join(parts)}</svg>'
        f"<figcaption>{axis.label}{keys}</figcaption></figure>\n\n"
    )


def _panel(title: str, end: float, lines: dict[str, list[float]], left: int) -> list[str]:
    finite = [y for line in lines.values() for y in line if math.isfinite(y)]
    low, high = min(0.0, *finite), max(0.0, *finite)
    span = high - low or 1.0
    x0, y0 = left + _LEFT, _TOP + _HEIGHT

    def height(y: float) -> float:
        return y0 - (y - low) / span * _HEIGHT

    parts = [
        f'<text class="t" x="{x0}" y="12">{title}</text>',
        f'<path class="axis" d="M{x0} {height(0):.1f}h{_WIDTH}M{x0 + _WIDTH / 2:g} {_TOP}V{y0}"/>',
    ]
    for x, number, kind in ((0, -end, "b"), (_WIDTH / 2, 0, "m"), (_WIDTH, end, "e")):
        parts.append(f'<text class="{kind}" x="{x0 + x:g}" y="{y0 + 14}">{number:g}</text>')
    for y in {low, high}:
        parts.append(f'<text class="e" x="{x0 - 5}" y="{height(y) + 4:.1f}">{_number(y)}</text>')
    for line, colour in zip(lines.values(), ("own0", "other0"), strict=False):
        step = _WIDTH / (len(line) - 1)
        points = (f"{x0 + i * step:.1f},{height(y):.1f}" for i, y in enumerate(line))
        parts.append(f'<polyline class="{colour}" points="{" ".join(points)}"/>')
    return parts


def _number(y: float) -> str:
    return f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.3g}"
