"""How much memory there is: GPUs by name, and sizes as people write them."""

from __future__ import annotations

import re

GIB = 2**30
# Memory that the driver reports for each, GiB: a little below the number in its name.
CARDS = {
    "b200": 178.4,
    "h200": 139.8,
    "h100": 79.1,
    "a100": 79.2,
    "a100-40": 39.4,
    "l40s": 44.4,
    "a6000": 47.5,
    "5090": 31.4,
    "4090": 23.5,
    "3090": 23.6,
    "l4": 22.0,
    "a10": 22.0,
    "t4": 14.6,
}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def memory_of(text: str) -> int:
    """Bytes of a card by name, or of a size: `80GiB`, `24g`. Anything else is a ValueError."""
    name = re.sub("^rtx[- ]?", "", str(text).strip().lower())
    if name in CARDS:
        return int(CARDS[name] * GIB)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:ib|b)?", name)
    size = float(found[1]) * _UNITS[found[2]] if found else 0
    if not 2**20 <= size < 2**60:
        known = ", ".join(CARDS)
        raise ValueError(f"gpu: expected a size as 80GiB or one of {known}, got {text!r}")
    return int(size)
