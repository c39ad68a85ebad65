"""What cuTensorMapEncodeTiled would encode, in an encoding of our own."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from _memory import Fault, Global, load, store
from _values import Array

_FORMAT = struct.Struct("<4sBBBx5Q4Q5IQ")  # 128 bytes at most
_MAGIC = b"tmap"
SIZE = 128
# Bytes that a swizzle exchanges cells within.
SPANS = {0: 16, 1: 32, 2: 64, 3: 128}


class TensorMap(NamedTuple):
    address: int
    sizes: tuple[int, ...]  # of each dimension, innermost first
    pitches: tuple[int, ...]  # in bytes, of all dimensions but the first
    box: tuple[int, ...]
    itemsize: int
    swizzle: int  # 0 none, 1, 2, 3 for 32, 64, 128 bytes

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.itemsize

    def problem(self) -> str | None:
        """Why the driver would refuse it."""
        inner = self.box[0] * self.itemsize
        wrong = {
            "address": self.address % 16,
            "sizes": not all(0 < x <= 2**32 for x in self.sizes),
            "pitches": not all(x % 16 == 0 and 0 <= x < 2**40 for x in self.pitches),
            "box": not all(0 < x <= 256 for x in self.box) or inner % 16,
            "swizzle": self.swizzle and inner > SPANS[self.swizzle],
        }
        return next((name for name, bad in wrong.items() if bad), None)

    def encoded(self) -> bytes:
        def filled(values: tuple[int, ...], count: int) -> list[int]:
            return [*values, *[0] * (count - len(values))]

        return _FORMAT.pack(
            _MAGIC, len(self.sizes), self.itemsize, self.swizzle, *filled(self.sizes, 5),
            *filled(self.pitches, 4), *filled(self.box, 5), self.address,
        ).ljust(SIZE, b"\0")  # fmt: skip

    @classmethod
    def at(cls, memory: Global, address: int) -> TensorMap:
        if address % 64:
            raise Fault("a tensor map is aligned to 64 bytes")
        raw = load(memory, address + np.arange(0, SIZE, 8), np.dtype("u8"), 1)[0].tobytes()
        magic, rank, itemsize, swizzle, *rest = _FORMAT.unpack(raw[: _FORMAT.size])
        if magic != _MAGIC:
            raise Fault("no tensor map there")
        sizes, pitches, box = rest[:rank], rest[5 : 4 + rank], rest[9 : 9 + rank]
        return cls(rest[14], tuple(sizes), tuple(pitches), tuple(box), itemsize, swizzle)

    def cells(self, place: list[int]) -> tuple[Array, Array, slice]:
        """Addresses of the box's cells inside the tensor, the rows and the columns they are of."""
        axes = [np.arange(b) + p for b, p in zip(self.box[1:], place[1:], strict=True)]
        grids = np.meshgrid(*reversed(axes), indexing="ij")[::-1]  # the last varies slowest
        inside, addresses = np.ones(grids[0].shape, bool), np.full(grids[0].shape, self.address)
        for grid, size, pitch in zip(grids, self.sizes[1:], self.pitches, strict=True):
            inside &= (grid >= 0) & (grid < size)
            addresses = addresses + grid * pitch
        first = min(max(-place[0], 0), self.box[0])
        last = max(min(self.sizes[0] - place[0], self.box[0]), first)
        inside, columns = inside.ravel(), place[0] + np.arange(first, last)
        cells = addresses.ravel()[inside, None] + columns * self.itemsize
        return cells, inside, slice(first, last)

    def load(self, memory: Global, place: list[int]) -> Array:
        """The box's bytes, zeros outside."""
        cells, inside, columns = self.cells(place)
        kind = np.dtype(f"u{self.itemsize}")
        found = np.zeros((len(inside), self.box[0]), kind)
        if cells.size:
            found[inside, columns] = load(memory, cells.ravel(), kind, 1)[0].reshape(cells.shape)
        return found.view(np.uint8)

    def store(self, memory: Global, place: list[int], given: Array) -> None:
        cells, inside, columns = self.cells(place)
        values = np.ascontiguousarray(given).view(f"u{self.itemsize}")
        values = values.reshape(len(inside), self.box[0])[inside, columns]
        if cells.size:
            store(memory, cells.ravel(), [values.ravel()])


def swizzled(start: int, count: int, swizzle: int) -> Array:
    """Addresses of 16 bytes each, of `count` bytes from `start` on as they lie."""
    if start % 128:
        raise Fault(f"a copy's shared memory starts at {start}, no multiple of 128")
    return exchanged(start + np.arange(0, count, 16), swizzle)


def exchanged(addresses: Array, swizzle: int) -> Array:
    mask = SPANS[swizzle] // 16 - 1
    return addresses ^ ((addresses >> 7 & mask) << 4)
