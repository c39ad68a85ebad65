"""Which of the forwards for a GPU is the fastest on one, as `fastpo bench head` found it.

fastest.json holds the measurements' verdict, `fastpo bench choose` writes it from reports. Devices
that are not in it run what `registry.choose` prefers. One forward for all numbers of tokens, words
and outputs: a pass without gradient must have the same bits as one with.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

from . import registry

TABLE = Path(__file__).with_name("fastest.json")

Row = dict[str, Any]  # device, dtype, hidden, backend; products of each, and the report


def read(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


@functools.cache
def table() -> list[Row]:
    return read(TABLE)


@functools.cache
def fastest(device: str, dtype: str, hidden: int) -> str | None:
    """On a device by its name; for the measured hidden size that is nearest, as a ratio."""
    rows = [row for row in table() if (row["device"], row["dtype"]) == (device, dtype)]
    if not rows:
        return None
    nearest = min(rows, key=lambda row: abs(math.log(row["hidden"] / hidden)))
    backend: str = nearest["backend"]
    return backend


def choose(backend: str | None, device: torch.device, dtype: torch.dtype, hidden: int) -> str:
    """The named backend of a head, the fastest measured, or what `registry.choose` prefers."""
    if backend is None and device.type == "cuda":
        name = fastest(
            torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."), hidden
        )
        if name is not None and registry.unavailable(name, device) is None:
            return name
    return registry.choose(backend, device)
