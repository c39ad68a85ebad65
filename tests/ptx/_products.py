"""Products of tensor cores: a warp's, and a warp group's, each of whose warps has 16 of 64 rows."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from _arithmetic import from_bfloat16
from _machine import LANES, Step, Warp
from _memory import load
from _tensor_map import exchanged
from _text import Statement
from _values import Array, poison

if TYPE_CHECKING:
    from _statements import Scope

GROUP = 128  # threads
_WORDS = np.dtype("u2")
_SPANS = {0: 0, 1: 3, 2: 2, 3: 1}  # a descriptor's number to a tensor map's


class Shape(NamedTuple):
    columns: int
    depth: int
    half: bool  # float16, not bfloat16


def matrix(warp: Warp, descriptor: int, rows: Array, shape: Shape) -> Array:
    """Rows [len(rows), depth] float32 of what lies in shared memory, `depth` contiguous."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> x & 0x3FFF) << 4 for x in (16, 32))
    swizzle = _SPANS[descriptor >> 62 & 3]
    if descriptor >> 49 & 7:
        raise NotImplementedError("a base offset")
    k = np.arange(shape.depth)
    if swizzle:
        span = 16 << swizzle
        places = start + (rows // 8)[:, None] * stride + (rows % 8)[:, None] * span + 2 * k
    else:
        places = start + (rows // 8)[:, None] * stride + (rows % 8)[:, None] * 16
        places = places + k // 8 * leading + k % 8 * 2
    cells = load(warp.block.shared, exchanged(places, swizzle).ravel(), _WORDS, 1)[0]
    return numbers(cells, shape.half).reshape(len(rows), shape.depth)


def numbers(cells: Array, half: bool) -> Array:
    return cells.view(np.float16).astype(np.float32) if half else from_bfloat16(cells)


def multiplied(a: Array, b: Array, c: Array) -> Array:
    """a·bᵀ + c, rounded once. A library's order of float32 sums may differ from row to row."""
    return (a.astype(np.float64) @ b.astype(np.float64).T + c).astype(np.float32)


def from_registers(values: list[Array], half: bool) -> Array:
    """[16, 16] of four registers a lane, two cells each."""
    found = np.empty((16, 16), np.float32)
    lane = np.arange(LANES)
    for i, value in enumerate(values):
        pair = numbers(np.ascontiguousarray(value).view(_WORDS), half).reshape(LANES, 2)
        for j in range(2):
            found[lane // 4 + 8 * (i % 2), lane % 4 * 2 + j + 8 * (i // 2)] = pair[:, j]
    return found


def to_rows(registers: Array) -> Array:
    """[16, columns] of [columns / 2, 32 lanes]: how a warp's results lie."""
    parts = registers.reshape(-1, 2, 2, 8, 4)  # columns / 8, row half, column, row, pair
    return parts.transpose(1, 3, 0, 4, 2).reshape(16, -1)


def to_registers(rows: Array) -> Array:
    parts = rows.reshape(2, 8, -1, 4, 2)
    return np.ascontiguousarray(parts.transpose(2, 0, 4, 1, 3)).reshape(-1, LANES)


class _Pending:
    """Results that are not there yet: of all products into the same registers."""

    def __init__(self, warp: Warp, names: list[str]) -> None:
        missing = poison(np.dtype("u4"), warp.lanes)
        held = [warp.registers.get(name, missing).view(np.float32) for name in names]
        self.rows, self.names, self.left = to_rows(np.stack(held)), names, 0

    def add(self, warp: Warp, a: Array, b: Array, keeps: bool) -> None:
        self.rows = multiplied(a, b, self.rows if keeps else np.zeros_like(self.rows))
        self.left -= 1
        if self.left == 0:
            for name, value in zip(self.names, to_registers(self.rows), strict=True):
                warp.registers[name] = value.astype(np.float32).view(np.uint32)
            del warp.products[tuple(self.names)]


def of_warp(scope: Scope, given: Statement) -> Step:
    """mma.sync of 16 rows and 8 columns: a and b in registers, at once."""
    if "m16n8k16" not in given.parts or given.parts[-2] not in ("f16", "bf16"):
        raise NotImplementedError(given.text)
    half = given.parts[-2] == "f16"
    names = scope.several(given.operands[0])
    a, b, c = (
        [scope.lanes(x, kind) for x in scope.several(operand)]
        for operand, kind in zip(given.operands[1:], ("u32", "u32", "f32"), strict=True)
    )
    writes = [scope.write(x) for x in names]

    def step(warp: Warp, active: Array | None) -> None:
        if active is not None:
            raise RuntimeError(f"lanes are missing: {given.text[:60]}")
        # A column of b lies as a row of a does.
        columns = from_registers([b[i](warp) for i in (0, 0, 1, 1)], half)[:8]
        held = to_rows(np.stack([x(warp) for x in c]))
        rows = multiplied(from_registers([x(warp) for x in a], half), columns, held)
        for write, value in zip(writes, to_registers(rows), strict=True):
            write(warp, value.astype(np.float32), None)

    return step


def group(given: Statement) -> Step:
    """Products of a warp group are done together: one of its threads may say so for all."""
    if given.parts[1] == "commit_group":

        def close(warp: Warp, active: Array | None) -> None:
            warp.close("products")
            warp.closed += 1
            warp.machine.moved += 1

        return close
    left = int(given.operands[0], 0)

    def wait(warp: Warp, active: Array | None) -> bool:
        first = warp.first // GROUP * GROUP
        others = [x for x in warp.block.warps if first <= x.first < first + GROUP]
        needed = warp.closed - left
        if any(x.closed < needed for x in others):
            return True
        for each in others:
            each.drain("products", each.closed - needed)
        return False

    return wait


def build(scope: Scope, given: Statement) -> Step:
    sizes = re.fullmatch(r"m64n(\d+)k(\d+)", next(x for x in given.parts if x.startswith("m64")))
    if sizes is None or given.parts[-3] != "f32" or given.parts[-1] not in ("f16", "bf16"):
        raise NotImplementedError(given.text)
    shape = Shape(int(sizes[1]), int(sizes[2]), given.parts[-1] == "f16")
    names = scope.several(given.operands[0])
    in_registers = given.operands[1].startswith("{")
    left = [
        scope.lanes(x, "u32" if in_registers else "u64") for x in scope.several(given.operands[1])
    ]
    right, keeps = scope.lanes(given.operands[2], "u64"), scope.lanes(given.operands[3], "pred")
    # Signs of both, and which of them lies the other way round.
    if [int(x) for x in given.operands[4:]] != [1, 1, *[0] * (1 if in_registers else 2)]:
        raise NotImplementedError(given.text)

    def step(warp: Warp, active: Array | None) -> None:
        if active is not None:
            raise RuntimeError(f"lanes are missing: {given.text[:60]}")
        rows = 16 * (warp.first // LANES % 4) + np.arange(16)
        descriptors = [int(x(warp)[0]) for x in (() if in_registers else left)]
        held = from_registers([x(warp) for x in left], shape.half) if in_registers else None
        of_b, kept = int(right(warp)[0]), bool(keeps(warp)[0])
        pending = warp.products.get(tuple(names))
        if pending is None:
            pending = warp.products[tuple(names)] = _Pending(warp, names)
        pending.left += 1
        found = pending

        def work() -> None:
            a = matrix(warp, descriptors[0], rows, shape) if held is None else held
            found.add(warp, a, matrix(warp, of_b, np.arange(shape.columns), shape), kept)

        for name in names:
            warp.registers[name] = poison(np.dtype("u4"), warp.lanes)
        warp.later("products", work)

    return step
