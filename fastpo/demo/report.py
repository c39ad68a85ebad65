"""The figures of a demo run: collected from the events, printed, and written as report.json."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from fastpo import __version__

from ..bench.report import finite
from . import plot
from .objective import Objective
from .options import Options
from .plot import TITLES
from .prepare import Fitted

Events = list[dict[str, Any]]
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "numpy")
CPU_NOTE = (
    "On a CPU TRL's head runs as plain torch operations over all positions, prompts and padding "
    "too;\non a GPU it is a Triton kernel, and the difference is smaller than here."
)
NO_PICTURE = "none without matplotlib: pip install 'fastpo[plots]'"
BUILT_NOTE = (
    "Shared prompts spare the layers; of this small model's step the head is most. In a deep model "
    "the\nlayers are: fastpo bench step --shared-prompts"
)


def opening(options: Options, fitted: Fitted, objective: Objective) -> str:
    """What is about to be trained on what."""
    pairs = fitted.pairs
    kind = "conversations" if pairs.conversational else "plain text"
    lines = [
        f"data       {pairs.source}: {len(pairs.train)} pairs to train on, "
        f"{len(pairs.held_out)} held out, {kind}, longest {fitted.longest} tokens",
    ]
    if fitted.truncated:
        lost = f", {fitted.dropped} of them left out (no room for an answer)"
        cut = f"{fitted.truncated} rows over {fitted.max_length} tokens"
        lines.append(f"truncated  {cut}{lost if fitted.dropped else ''}")
    shape = options.shape
    new = f"new Llama, {shape.layers} layers of {shape.hidden}, {shape.vocab:,} words"
    lines.append(f"model      {options.model or new}")
    lines.append(f"objective  {objective.title}")
    lines.append(f"training   {options.steps} steps of {options.pairs_per_step} pairs, three times")
    return "\n".join(lines)


def collect(
    options: Options, fitted: Fitted, objective: Objective, runs: dict[str, Events]
) -> dict[str, Any]:
    """All figures, as they go into report.json."""
    from ..bench.machine import installed  # imports torch

    variants = {name: variant(runs[name]) for name in TITLES}
    facts = _merged(runs["fastpo"])
    figures: dict[str, Any] = {
        "fastpo": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {p: installed(p) for p in PACKAGES},
        "machine": machine(facts),
        "options": {key: _plain(value) for key, value in asdict(options).items()},
        "objective": asdict(objective),
        "data": _data(fitted),
        "model": {"parameters": facts["parameters"], "start": str(options.model or "built")},
        "variants": variants,
        "comparison": {n: compare(variants[n], variants["trl"]) for n in ("fastpo", "shared")},
    }
    if "warmup" in runs:
        figures["warmup"] = variant(runs["warmup"])
    if "answers" in runs:
        figures["answers"] = runs["answers"]
    return figures


def variant(events: Events) -> dict[str, Any]:
    """One training: curves, times with the first step apart, memory, held-out figures."""
    steps = [event for event in events if "step" in event]
    facts = _merged(events)
    seconds = [event["seconds"] for event in steps]
    figures = {
        "loss": [event["loss"] for event in steps],
        "first_step_seconds": seconds[0],
        "step_seconds": seconds[1:],
        "median_step_seconds": median(seconds[1:]) if len(seconds) > 1 else None,
        "memory_bytes": facts["memory"],
        "tokens_saved": facts["tokens_saved"],
    }
    if steps[-1]["accuracy"] is not None:
        figures["reward_accuracy"] = [event["accuracy"] for event in steps]
    evaluations = [event for event in events if "evaluated" in event]
    if evaluations:
        # At the start policy and reference are one model: every pair is a tie.
        figures["held_out"] = {
            "step": [0] + [event["evaluated"] for event in evaluations],
            "reward_accuracy": [0.5] + [event["accuracy"] for event in evaluations],
            "reward_margin": [0.0] + [event["margin"] for event in evaluations],
        }
        for when in ("before", "after"):
            key = f"prefers_chosen_{when}"
            if key in facts:
                figures["held_out"][key] = facts[key]
    return figures


def compare(fastpo: dict[str, Any], trl: dict[str, Any]) -> dict[str, Any]:
    differences = [abs(a - b) for a, b in zip(fastpo["loss"], trl["loss"], strict=True)]
    finite = all(map(math.isfinite, differences))
    times = fastpo["median_step_seconds"], trl["median_step_seconds"]
    memory = (v["memory_bytes"]["increase"] for v in (fastpo, trl))
    return {
        "largest_loss_difference": max(differences) if finite else None,
        "mean_loss_difference": sum(differences) / len(differences) if finite else None,
        "times_faster": _ratio(*times),
        "times_less_memory": _ratio(*memory),
    }


def machine(facts: dict[str, Any]) -> dict[str, Any]:
    from ..bench.machine import cpu_name  # imports torch

    found = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": facts["threads"],
        "system": platform.platform(),
        "device": facts["device"],
    }
    if facts["device"] == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def write(figures: dict[str, Any], folder: Path) -> None:
    """report.json and, with matplotlib, plot.png; a number that is not finite becomes null."""
    text = json.dumps(finite(figures), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    if plot.available():
        plot.draw(figures, folder / "plot.png")


def closing(figures: dict[str, Any], out: Path) -> str:
    """The table and where everything lies."""
    runs = [figures["variants"][name] for name in TITLES]
    comparison = figures["comparison"]
    rows: list[tuple[str, ...]] = [("", *TITLES.values(), "")]
    faster = plot.best(comparison, "times_faster", "faster", "slower")
    rows.append(("median step", *map(_seconds, runs), faster))
    kind = runs[0]["memory_bytes"]["kind"]
    less = plot.best(comparison, "times_less_memory", "less", "more")
    rows.append((f"memory of training ({kind})", *map(_bytes, runs), less))
    computed = [f"{1 - run['tokens_saved']:.0%}" for run in runs]
    rows.append(("tokens through the layers", *computed, "of a padded batch"))
    last = [f"{run['loss'][-1]:.6f}" for run in runs]
    rows.append(("loss, last step", *last, plot.difference(comparison)))
    ends = [f"{run['held_out']['reward_accuracy'][-1]:.1%}" for run in runs]
    rows.append(("held-out reward accuracy", *ends, "from 50.0% (all ties)"))
    held_out = figures["variants"]["fastpo"]["held_out"]
    if "prefers_chosen_after" in held_out:
        after, before = held_out["prefers_chosen_after"], held_out["prefers_chosen_before"]
        rows.append(("held-out chosen is likelier", f"{after:.1%}", "", "", f"from {before:.1%}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["", *(_line(row, widths) for row in rows), ""]
    for answer in figures.get("answers", ()):
        lines += [*(paragraph(answer, part) for part in ("prompt", "before", "after")), ""]
    picture = out / "plot.png" if plot.available() else NO_PICTURE
    for what, where in {
        "trained model": out / "model",
        "figures": out / "report.json",
        "plot": picture,
    }.items():
        lines.append(f"{what:<14} {where}")
    lines.append(f"{'total':<14} {figures['seconds']:.0f} s")
    lines += ["", CPU_NOTE] if figures["machine"]["device"] == "cpu" else []
    lines += ["", BUILT_NOTE] if figures["model"]["start"] == "built" else []
    return "\n".join(lines)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    name, *cells, note = row
    middle = "   ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
    return f"{name:<{widths[0]}}   {middle}   {note}".rstrip()


def paragraph(answer: dict[str, str], part: str) -> str:
    """One paragraph: whatever a model says, it does not move the cursor."""
    text = "".join(c if c.isprintable() else " " for c in answer[part])
    return fill(text, 100, initial_indent=f"{part:<9}", subsequent_indent=9 * " ")


def _seconds(run: dict[str, Any]) -> str:
    value = run["median_step_seconds"]
    return "-" if value is None else f"{value:.3f} s"


def _bytes(run: dict[str, Any]) -> str:
    return f"{run['memory_bytes']['increase'] / 2**20:,.0f} MiB"


def _data(fitted: Fitted) -> dict[str, Any]:
    return {
        "source": fitted.pairs.source,
        "train_pairs": len(fitted.pairs.train),
        "held_out_pairs": len(fitted.pairs.held_out),
        "longest_tokens": fitted.longest,
        "max_length": fitted.max_length,
        "truncated_rows": fitted.truncated,
        "dropped_rows": fitted.dropped,
    }


def _merged(events: Events) -> dict[str, Any]:
    """What is said once in a run; steps and evaluations aside."""
    often = {"step", "evaluated", "evaluating"}
    rest = (event for event in events if not often & event.keys())
    return {key: value for event in rest for key, value in event.items()}


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return theirs / ours if ours and theirs else None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
