"""What tables and pictures read from a report; one written by hand is told what it lacks.

A dict wants an object with at least these keys, a list of one wants a list of such, and a function
says what it wants of an object when it has seen it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BenchError


@dataclass(frozen=True)
class Kind:
    """A single value: what it is called, and whether one is of it."""

    name: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e15 < value < 1e15  # NaN is not


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_load(value: Any) -> bool:
    return isinstance(value, list) and [*map(_is_number, value)] == [True] * 3


TEXT = Kind("a line of text", _is_text)
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
NUMBER = Kind("a number within 1e15", _is_number)
POSITIVE = Kind("a number > 0 within 1e15", lambda x: _is_number(x) and x > 0)
COUNT = Kind("an integer of 1 to 1e15", lambda x: type(x) is int and 1 <= x <= 1e15)
# `report.write` makes null of a number that is not finite.
ERROR = Kind("a number or null", lambda x: x is None or _is_number(x))
VERSION = Kind("a line of text or null", lambda x: x is None or _is_text(x))
LOAD = Kind("three numbers", _is_load)
LOAD_OR_NULL = Kind("three numbers or null", lambda x: x is None or _is_load(x))


def _head_row(row: dict[str, Any]) -> dict[str, Any]:
    wanted = _SIZE | {"variant": TEXT, "own": FLAG, "case": TEXT, "status": TEXT}
    if "median_ms" in row:
        wanted |= {"median_ms": NUMBER, "products": NUMBER, "errors": {"logps": ERROR}}
    return wanted | {key: NUMBER for key in ("products", "extra_mib") if key in row}


def _step_row(row: dict[str, Any]) -> dict[str, Any]:
    timed = ("median_s", "tokens_per_s", "extra_mib") if row.get("status") == "ok" else ()
    return {"variant": TEXT, "pairs": COUNT, "length": COUNT} | dict.fromkeys(timed, NUMBER)


def _shared_row(row: dict[str, Any]) -> dict[str, Any]:
    return _step_row(row) | {"texts": TEXT, "tokens": [COUNT]}


_SIZE: dict[str, Any] = {"tokens": COUNT, "vocab": COUNT, "hidden": COUNT}
_FLOOR = dict.fromkeys(("score", "frozen", "trainable"), POSITIVE)
_FIT = {"of": TEXT, "variant": TEXT, "limit_mib": NUMBER, "largest": NUMBER, "at_limit": FLAG}
_PRIMITIVE = {"primitive": TEXT, "form": TEXT, "mode": TEXT, "extra_mib": NUMBER}
_MEASURED = {"mib": NUMBER, "step_s": NUMBER, "load_average": LOAD}


def _soak_row(row: dict[str, Any]) -> dict[str, Any]:
    numbers = ("early_mib", "late_mib", "difference")
    return {"part": TEXT, "times": COUNT} | {key: NUMBER for key in numbers if key in row}


def _architecture_row(row: dict[str, Any]) -> dict[str, Any]:
    served = dict.fromkeys(("lazy", "attach", "shared"), TEXT) | {"largest": NUMBER}
    return {"type": TEXT, "model": TEXT} | (served if row.get("model") == "built" else {})


_MACHINE = {
    **dict.fromkeys(("created", "device", "device_type", "capability", "dtype"), TEXT),
    "threads": COUNT,
    "load_average": LOAD_OR_NULL,
    "versions": dict.fromkeys(("torch", "trl", "liger_kernel"), VERSION),
}
_NO_DTYPE = {name: kind for name, kind in _MACHINE.items() if name != "dtype"}
WHATS: dict[str, dict[str, Any]] = {
    "head": _MACHINE
    | {"backend": TEXT, "shapes": [_SIZE | {"floor_ms": _FLOOR}], "rows": [_head_row]},
    "step": _MACHINE
    | {"model": {"name": TEXT, "parameters": NUMBER}, "rows": [_step_row], "fits": [_FIT]},
    "shared": _MACHINE
    | {"model": {"name": TEXT, "parameters": NUMBER}, "clock": TEXT, "checkpointing": FLAG}
    | {"rows": [_shared_row], "fits": [_FIT]},
    "soak": _MACHINE | {"rows": [_soak_row]},
    "sweep": {},  # neither drawn nor in a table
    "primitives": _MACHINE
    | {**dict.fromkeys("NVHk", COUNT), "logits_mib": NUMBER, "rows": [_PRIMITIVE]},
    "trainers": _MACHINE
    | {**dict.fromkeys("VTH", COUNT), "rows": [{"trainer": TEXT, "patched": FLAG} | _MEASURED]},
    "frameworks": _MACHINE
    | {**dict.fromkeys("VTH", COUNT), "steps": COUNT, "framework": TEXT, "version": TEXT}
    | {"rows": [{"case": TEXT, "plain": _MEASURED, "fastpo": _MEASURED, "full_logits": [TEXT]}]},
    "real model": {
        **_NO_DTYPE,
        "model": TEXT,
        "errors": [
            {"dtype": TEXT, "head": TEXT, "tokens": COUNT} | dict.fromkeys(("max", "mean"), NUMBER)
        ],
        "drift_from_float32": [
            {"dtype": TEXT, "head": TEXT} | dict.fromkeys(("largest", "mean"), NUMBER)
        ],
        "steps": [
            {"head": TEXT, "data": TEXT, "cpu_s": [POSITIVE], "wall_s": [POSITIVE]}
            | {"extra_mib": NUMBER, **dict.fromkeys(("pairs", "length", "threads"), COUNT)}
        ],
    },
    "plan errors": {
        **_NO_DTYPE,
        "rows": [
            dict.fromkeys(("model", "way", "head"), TEXT)
            | dict.fromkeys(("told", "held"), POSITIVE)
        ],
    },
    "lazy logits": {
        **_NO_DTYPE,
        "shape": {**_SIZE, "dtype": TEXT},
        "rows": [
            dict.fromkeys(("reading", "logits"), TEXT) | {"cpu_s": POSITIVE, "extra_mib": NUMBER}
        ],
    },
    "supports": {
        **_NO_DTYPE,
        "shape": {**_SIZE, "dtype": TEXT},
        "rows": [
            {"words": COUNT, "trained": FLAG}
            | dict.fromkeys(("few_s", "many_s", "plain_s"), POSITIVE)
        ],
    },
    "sampler": {
        **_NO_DTYPE,
        "model": TEXT,
        "sampling": TEXT,
        "rows": [
            {"over": TEXT, "tokens": COUNT}
            | dict.fromkeys(("mean", "outside", "q01", "median", "q99", "largest"), NUMBER)
        ],
    },
    "plan contexts": {
        **_NO_DTYPE,
        "batch_context": COUNT,
        "models": [
            {"name": TEXT, "card": TEXT, "memory": COUNT, "weights": COUNT, "lora": FLAG},
        ],
        "rows": [
            dict.fromkeys(("model", "way", "head"), TEXT)
            | dict.fromkeys(("context", "batch"), NUMBER)
        ],
    },
    "architectures": {
        **_NO_DTYPE,
        "versions": {"torch": VERSION, "trl": VERSION, "transformers": TEXT},
        "rows": [_architecture_row],
    },
}


def check(report: Any, path: Path) -> None:
    """BenchError for the first thing that is not as `WHATS` has it."""
    what = report.get("what") if isinstance(report, dict) else None
    if not isinstance(what, str) or what not in WHATS:
        kinds = ", ".join(WHATS)
        raise BenchError(f"{path}: what: expected {kinds} of fastpo bench, got {_got(what)}")
    complaint = next(_complaints(report, WHATS[what], ""), None)
    if complaint is not None:
        raise BenchError(f"{path}: {complaint}")


_NOTHING = object()


def _complaints(value: Any, wanted: Any, name: str) -> Iterator[str]:
    if isinstance(wanted, Kind):
        if not wanted.holds(value):
            yield f"{name}: expected {wanted.name}, got {_got(value)}"
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            yield f"{name}: expected a list, got {_got(value)}"
            return
        for i, each in enumerate(value):
            yield from _complaints(each, wanted[0], f"{name}[{i}]")
    elif not isinstance(value, dict):
        yield f"{name}: expected an object, got {_got(value)}"
    else:
        fields = wanted(value) if callable(wanted) else wanted
        for key, inner in fields.items():
            place = f"{name}.{key}" if name else key
            yield from _complaints(value.get(key, _NOTHING), inner, place)


def _got(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value)  # ASCII, and in one line
    return text if len(text) <= 40 else f"{text[:40]}…"
