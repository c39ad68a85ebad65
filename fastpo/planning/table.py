"""A plan as text: parts side by side, what fits, what to paste."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import fits
from .cards import GIB
from .estimate import PARTS, Estimate

_NAMES = {
    "device": "driver, allocator, buckets",
    "optimizer": "optimizer states",
    "reference": "reference model",
}


def table(plan: Any) -> str:
    setting = plan.setting
    kind = "full" if setting.lora is None else f"LoRA r={setting.lora.rank}"
    kind += " on 4 bits" * setting.load_in_4bit
    checkpointing = {"none": "", "layers": ", checkpointing", "offload": ", offloading"}
    lines = [
        f"{setting.trainer.upper()} of {setting.model}, {kind}, {setting.dtype}, "
        f"{setting.optimizer}{checkpointing[setting.checkpointing]}, {setting.attention}: "
        f"{setting.batch} x "
        f"{setting.context:,} tokens"
        + (f", prompts of {setting.prompt_rows} rows" if setting.prompt_rows > 1 else "")
        + (f", {setting.devices} devices, {setting.strategy}" if setting.devices > 1 else ""),
        "",
    ]
    rows = [("GiB at the peak of a step", *plan.heads), *_parts(plan), *_fits(plan)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    lines += ["", *_lengths(plan), *_verdict(plan), *(f"note: {note}" for note in plan.notes)]
    config = {"distillation": "Distillation"}.get(setting.trainer, setting.trainer.upper())
    given = ", ".join(f"{name}={value!r}" for name, value in plan.settings.items())
    return "\n".join([*lines, f"{config}Config({given})"])


def _parts(plan: Any) -> Iterator[tuple[str, ...]]:
    heads = [head.estimate for head in plan.heads.values()]
    for part in PARTS:
        if any(head.parts[part] for head in heads):
            cells = (f"{head.parts[part] / GIB:.2f}" for head in heads)
            name = _NAMES.get(part, part)
            yield (name.replace("reference", "teacher") if plan.setting.distils else name, *cells)
    yield ("in all", *(f"{head.peak / GIB:.2f}" for head in heads))
    measured = [head.measured for head in plan.heads.values()]
    if any(measured):
        yield ("measured", *map(_measured, measured))


def _measured(found: int | str | None) -> str:
    if isinstance(found, int):
        return f"{found / GIB:.2f}"
    return "-" if found is None else found


def _fits(plan: Any) -> Iterator[tuple[str, ...]]:
    if plan.setting.memory is None:
        return
    for what in ("context", "batch"):
        found = [getattr(head, what) for head in plan.heads.values()]
        if any(found):
            name = {"context": "longest context", "batch": "largest batch"}[what]
            yield (f"{name} that fits", *(_largest(x, what) for x in found))


def _largest(found: Estimate | None, what: str) -> str:
    if found is None:
        return "none"
    size = getattr(found.setting, what)
    return f"{size:,}" + " or more" * (size >= fits.end_of(found.setting, what))


def _lengths(plan: Any) -> Iterator[str]:
    if plan.lengths is not None:
        x = plan.lengths
        yield (
            f"data: {x.rows:,} rows, prompt {x.prompt:.0f} and answer {x.answer:.0f} tokens on "
            f"average, 99 % within {x.context:,}, the longest {x.longest:,}; batches of 8 items "
            f"are {x.padding:.0%} pads, and shared_prompts computes {x.shared:.0%} less of the rest"
        )


def _verdict(plan: Any) -> Iterator[str]:
    memory = plan.setting.memory
    if memory is None:
        return
    over = plan.heads["fastpo"].estimate.peak - memory
    card = f"{memory / GIB:.1f} GiB"
    if over <= 0:
        yield f"fits into {card} with fastpo, {-over / GIB:.1f} GiB to spare"
    else:
        yield (
            f"does not fit into {card} with fastpo: {over / GIB:.1f} GiB are missing; try "
            "--gradient-checkpointing, --lora, --optimizer adamw8bit, a shorter --context"
        )
