"""What lanes of a warp, or warps of a block, do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from _machine import LANES, Step, Warp, arrived
from _memory import load, store
from _text import Statement
from _values import Array

if TYPE_CHECKING:
    from _statements import Scope


def _lanes(warp: Warp, active: Array | None) -> Array:
    return np.ones(warp.lanes, bool) if active is None else active


def _shuffled(scope: Scope, given: Statement) -> Step:
    mode = given.parts[2]
    to, _, inside = given.operands[0].partition("|")
    writes = scope.write(to), scope.write(inside or "_")
    value, by, clamp = (scope.lanes(x, "u32") for x in given.operands[1:4])

    def step(warp: Warp, active: Array | None) -> None:
        lane, b, c = np.arange(warp.lanes), by(warp).astype(int) & 31, clamp(warp).astype(int)
        segment = (c >> 8) & 31
        last = (lane & segment) | (c & 31 & ~segment)
        first = lane & segment
        if mode == "idx":
            source = first | (b & ~segment)
        else:
            source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b}[mode]
        good = source >= last if mode == "up" else source <= last
        source = np.where(good, source, lane)
        if not _lanes(warp, active)[source[_lanes(warp, active)]].all():
            raise RuntimeError(f"reads of a lane that is not there: {given.text}")
        writes[0](warp, value(warp)[source], active)
        writes[1](warp, good, active)

    return step


def _voted(scope: Scope, given: Statement) -> Step:
    write, read = scope.write(given.operands[0]), scope.lanes(given.operands[1], "pred")
    mode = given.parts[2]

    def step(warp: Warp, active: Array | None) -> None:
        votes = read(warp) & _lanes(warp, active)
        if mode == "ballot":
            found = np.array((votes.astype(np.uint64) << np.arange(warp.lanes, dtype="u8")).sum())
            found = np.full(warp.lanes, found, np.uint32)
        elif mode == "any":
            found = np.full(warp.lanes, votes.any())
        else:
            found = np.full(warp.lanes, votes.sum() == _lanes(warp, active).sum())
        write(warp, found, active)

    return step


def _elected(scope: Scope, given: Statement) -> Step:
    """The first lane."""
    number, _, chosen = given.operands[0].partition("|")
    writes = scope.write(number), scope.write(chosen)

    def step(warp: Warp, active: Array | None) -> None:
        lanes = _lanes(warp, active)
        leader = int(np.flatnonzero(lanes)[0])
        writes[0](warp, np.full(warp.lanes, leader, np.uint32), active)
        writes[1](warp, np.arange(warp.lanes) == leader, active)

    return step


def _reduced(scope: Scope, given: Statement) -> Step:
    functions = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce}
    function = next(functions[x] for x in given.parts if x in functions)
    write, read = scope.write(given.operands[0]), scope.lanes(given.operands[1], given.parts[-1])

    def step(warp: Warp, active: Array | None) -> None:
        value = read(warp)
        found = np.asarray(function(value[_lanes(warp, active)])).astype(value.dtype)
        write(warp, np.full(warp.lanes, found), active)

    return step


def _matrices(scope: Scope, given: Statement) -> Step:
    """8 x 8 of two bytes: lane i addresses a row, a lane holds two cells of each matrix."""
    if "trans" in given.parts:
        raise NotImplementedError(given.text)
    stores = given.parts[0] == "stmatrix"
    registers = scope.several(given.operands[1 if stores else 0])
    address = scope.address(given.operands[0 if stores else 1])
    reads = [scope.lanes(x, "u32") for x in registers] if stores else []
    writes = [scope.write(x) for x in registers]

    def step(warp: Warp, active: Array | None) -> None:
        if active is not None:
            raise RuntimeError(f"lanes are missing: {given.text}")
        for i in range(len(registers)):
            rows = address(warp)[8 * i : 8 * i + 8]
            if stores:
                cells = reads[i](warp).reshape(8, 4)
                store(warp.block.shared, rows, [np.ascontiguousarray(x) for x in cells.T])
            else:
                cells = np.stack(load(warp.block.shared, rows, np.dtype("u4"), 4), 1)
                writes[i](warp, cells.reshape(LANES).copy(), None)

    return step


def _barrier(scope: Scope, given: Statement) -> Step:
    if given.parts[:2] == ("bar", "warp"):
        return lambda warp, active: None
    if given.parts[:2] == ("barrier", "cluster"):
        return _cluster_barrier(scope, given)
    mode = given.parts[2] if given.parts[1] == "cta" else given.parts[1]
    if mode not in ("sync", "arrive"):
        raise NotImplementedError(given.text)
    number = scope.lanes(given.operands[0], "u32")
    count = scope.lanes(given.operands[1], "u32") if len(given.operands) > 1 else None

    def step(warp: Warp, active: Array | None) -> None:
        expected = warp.machine.launch.threads if count is None else int(count(warp)[0])
        lanes = _lanes(warp, active)
        warp.at[lanes] += 1
        barrier = int(number(warp)[lanes][0])
        warp.block.arrive(barrier, expected, warp, lanes, waits=mode == "sync")

    return step


def _cluster_barrier(scope: Scope, given: Statement) -> Step:
    """Nobody can go past the wait before all have arrived: they arrive where they wait."""

    def step(warp: Warp, active: Array | None) -> None:
        lanes = _lanes(warp, active)
        warp.at[lanes] += 1
        if "wait" in given.parts:
            cluster = warp.block.cluster
            cluster.wait = arrived(cluster.wait, cluster.lanes, warp, lanes)

    return step


BUILDERS: dict[str, Callable[[Scope, Statement], Step]] = {
    "shfl": _shuffled,
    "vote": _voted,
    "elect": _elected,
    "redux": _reduced,
    "stmatrix": _matrices,
    "ldmatrix": _matrices,
    "bar": _barrier,
    "barrier": _barrier,
}
