"""A plan as a picture: the parts of each head's peak, stacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cards import GIB
from .estimate import PARTS


def save(plan: Any, path: Path) -> None:
    """Raises ValueError where matplotlib is missing or does not know the kind of file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "plot: expected matplotlib, got none; pip install 'fastpo[plots]'"
        raise ValueError(message) from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = list(plan.heads)
    bottoms = [0.0] * len(names)
    for part in PARTS:
        sizes = [head.estimate.parts[part] / GIB for head in plan.heads.values()]
        if any(sizes):
            axes.bar(names, sizes, 0.6, bottom=bottoms, label=part)
        bottoms = [x + y for x, y in zip(bottoms, sizes, strict=True)]
    if plan.setting.memory is not None:
        axes.axhline(plan.setting.memory / GIB, color="black", linestyle="--", linewidth=1)
    axes.set_ylabel("GiB at the peak of a step")
    axes.set_title(f"{plan.setting.trainer.upper()}, {plan.setting.batch} x {plan.setting.context}")
    figure.legend(loc="outside right upper")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"plot: expected a picture's path, got {path}: {error}") from error
