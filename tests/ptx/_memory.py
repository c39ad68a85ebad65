"""Loads and stores of many lanes: in the host's memory by its addresses, in a block's shared."""

from __future__ import annotations

import ctypes

import numpy as np
from _values import Array

# Shared memory of another block of the cluster: its rank, counted from one, above an offset.
RANK = 24
OFFSET = (1 << RANK) - 1


class Fault(Exception):
    """What a GPU stops at."""


class Global:
    """The host's memory. `allowed`: (first, past the last) of what may be touched, or any."""

    def __init__(self, allowed: list[tuple[int, int]] | None = None) -> None:
        self.allowed = None if allowed is None else np.array(sorted(allowed), np.int64)

    def at(self, addresses: Array, kind: np.dtype, count: int = 1) -> tuple[Array, Array]:
        """All of the memory that the addresses lie in, as `kind`, and where in it each is."""
        size = kind.itemsize * count
        if (addresses % size).any():
            raise Fault(f"{addresses[addresses % size != 0][0]:#x} is no multiple of {size}")
        if self.allowed is not None:
            self.check(addresses, size)
        first, last = int(addresses.min()), int(addresses.max()) + size
        bytes_ = (ctypes.c_char * (last - first)).from_address(first)
        return np.frombuffer(bytes_, kind), (addresses - first) // kind.itemsize

    def check(self, addresses: Array, size: int) -> None:
        assert self.allowed is not None
        found = np.searchsorted(self.allowed[:, 0], addresses, "right") - 1
        inside = (found >= 0) & (addresses + size <= self.allowed[found, 1])
        if not inside.all():
            raise Fault(f"{size} bytes at {addresses[~inside][0]:#x} belong to no tensor")


class Shared:
    """A block's. What nobody has written is poison."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(-(-size // 16) * 16, 0xFF, np.uint8)

    def at(self, addresses: Array, kind: np.dtype, count: int = 1) -> tuple[Array, Array]:
        size = kind.itemsize * count
        if (addresses % size).any() or (addresses + size > len(self.bytes)).any():
            raise Fault(f"shared memory of {len(self.bytes)} bytes: {size} at {addresses.max()}")
        return self.bytes.view(kind), addresses // kind.itemsize


def load(memory: Global | Shared, addresses: Array, kind: np.dtype, count: int) -> list[Array]:
    cells, places = memory.at(addresses, kind, count)
    return [cells[places + i] for i in range(count)]


def store(memory: Global | Shared, addresses: Array, values: list[Array]) -> None:
    cells, places = memory.at(addresses, values[0].dtype, len(values))
    for i, value in enumerate(values):
        cells[places + i] = value
