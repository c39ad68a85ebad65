"""Indices of logits [..., V] that take whole rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def leading_index(index: Any, ndim: int) -> Any:
    """The index without its part for the vocabulary, which must be all of it; else None."""
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = [_consumes(part) for part in parts]
    if None in consumed:
        return None
    taken = sum(n for n in consumed if n is not None)
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if dots:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (ndim - taken)
        taken = ndim
    if taken == ndim:
        last = parts.pop()
        if not (isinstance(last, slice) and last == slice(None)):
            return None
    return tuple(parts)


def _consumes(part: Any) -> int | None:
    """How many dimensions; None for what only a tensor can tell."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Tensor):
        return part.ndim if part.dtype in (torch.bool, torch.uint8) else 1
    plain = isinstance(part, int | slice) and not isinstance(part, bool)
    listed = isinstance(part, list) and all(isinstance(x, int) for x in part)
    return 1 if plain or listed else None
