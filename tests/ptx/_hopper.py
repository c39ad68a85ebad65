"""Barriers of shared memory, copies by the hardware, products of tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import _products
import numpy as np
from _machine import Block, Step, Warp
from _memory import OFFSET, RANK, Fault, load, store
from _tensor_map import TensorMap, swizzled
from _text import Statement
from _values import Array

if TYPE_CHECKING:
    from _statements import Scope

_CELLS = 16  # bytes that a swizzle keeps together


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes expected are there."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, count: int = 1, bytes_: int = 0) -> None:
        self.pending -= count
        self.bytes += bytes_
        if self.pending < 0:
            raise Fault("more arrivals at a barrier than it was made for")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


def _owner(warp: Warp, address: int) -> tuple[Block, int]:
    rank = address >> RANK
    return warp.block.cluster.blocks[rank - 1] if rank else warp.block, address & OFFSET


def _barrier_at(warp: Warp, address: int) -> Barrier:
    block, offset = _owner(warp, address)
    if offset not in block.barriers:
        raise Fault(f"no barrier at {offset}")
    return block.barriers[offset]


def _active(warp: Warp, active: Array | None) -> Array:
    return np.arange(warp.lanes) if active is None else np.flatnonzero(active)


def _mbarrier(scope: Scope, given: Statement) -> Step:
    what = given.parts[1]
    if what in ("try_wait", "test_wait"):
        return _asked(scope, given)
    first = 0 if given.operands[0].startswith("[") else 1
    address = scope.address(given.operands[first])
    number = given.operands[first + 1] if len(given.operands) > first + 1 else "1"
    value = scope.lanes(number, "u32")
    expects = "expect_tx" in given.parts

    def step(warp: Warp, active: Array | None) -> None:
        warp.machine.moved += 1
        addresses, values = address(warp).tolist(), value(warp).tolist()
        for lane in _active(warp, active):
            block, offset = _owner(warp, addresses[lane])
            if what == "init":
                block.barriers[offset] = Barrier(values[lane], values[lane])
            elif what == "inval":
                del block.barriers[offset]
            elif what == "arrive":
                found = _barrier_at(warp, addresses[lane])
                found.arrive(1 if expects else values[lane], values[lane] if expects else 0)
            elif what in ("expect_tx", "complete_tx"):
                sign = 1 if what == "expect_tx" else -1
                _barrier_at(warp, addresses[lane]).arrive(0, sign * values[lane])
            else:
                raise NotImplementedError(given.text)

    return step


def _asked(scope: Scope, given: Statement) -> Step:
    if "parity" not in given.parts:
        raise NotImplementedError(given.text)
    write, address = scope.write(given.operands[0]), scope.address(given.operands[1])
    parity = scope.lanes(given.operands[2], "u32")

    def step(warp: Warp, active: Array | None) -> None:
        addresses, parities = address(warp), parity(warp)
        found = np.zeros(warp.lanes, bool)
        for lane in _active(warp, active):
            found[lane] = _barrier_at(warp, int(addresses[lane])).phase != parities[lane] & 1
        warp.spins = not found[_active(warp, active)].all()
        write(warp, found, active)

    return step


def _mapped(scope: Scope, given: Statement) -> Step:
    write = scope.write(given.operands[0])
    address, rank = (scope.lanes(x, "u32") for x in given.operands[1:3])

    def step(warp: Warp, active: Array | None) -> None:
        write(warp, (rank(warp) + 1 << RANK) | (address(warp) & OFFSET), active)

    return step


def _copied(scope: Scope, given: Statement) -> Step:
    parts = given.parts
    if "commit_group" in parts or "wait_group" in parts or "wait_all" in parts:
        return _grouped(scope, given, "bulk" if "bulk" in parts else "copies")
    if "tensor" in parts:
        loads = parts[5].startswith("shared")
        return _tensor_loaded(scope, given) if loads else _tensor_stored(scope, given)
    if "bulk" in parts or "mbarrier" in parts:
        raise NotImplementedError(given.text)
    return _cells_copied(scope, given)


def _grouped(scope: Scope, given: Statement, kind: str) -> Step:
    if "commit_group" in given.parts:
        return lambda warp, active: warp.close(kind)
    left = int(given.operands[0], 0) if given.operands else 0
    return lambda warp, active: warp.drain(kind, left)


def _cells_copied(scope: Scope, given: Statement) -> Step:
    """4 to 16 bytes a lane, the last of them zeros where the source has fewer."""
    to, of = scope.address(given.operands[0]), scope.address(given.operands[1])
    size = int(given.operands[2], 0)
    given_size = scope.lanes(given.operands[3], "u32") if len(given.operands) > 3 else None
    cell = np.dtype(f"V{size}")

    def step(warp: Warp, active: Array | None) -> None:
        lanes = _active(warp, active)
        there, here = of(warp)[lanes], to(warp)[lanes]
        some = np.full(len(lanes), size) if given_size is None else given_size(warp)[lanes]
        if not np.isin(some, (0, size)).all():
            raise NotImplementedError(given.text)
        whole = some == size

        def work() -> None:
            cells = np.zeros(len(lanes), cell)
            if whole.any():
                cells[whole] = load(warp.machine.memory, there[whole], cell, 1)[0]
            store(warp.block.shared, here, [cells])

        if not warp.machine.eager:
            store(warp.block.shared, here, [np.full(size * len(lanes), 0xFF, np.uint8).view(cell)])
        warp.later("copies", work)

    return step


def _tensor_operand(scope: Scope, operand: str) -> tuple[Callable, list[Callable]]:
    """[map, {c0, c1}]: the map's address, and the coordinates, innermost first."""
    inside = operand.strip()[1:-1]
    braces = inside[inside.index("{") :].strip()
    return scope.address(operand), [scope.lanes(x, "s32") for x in scope.several(braces)]


def _tensor_loaded(scope: Scope, given: Statement) -> Step:
    to, (of, at) = scope.address(given.operands[0]), _tensor_operand(scope, given.operands[1])
    barrier = scope.address(given.operands[2])
    many = any(x.startswith("multicast") for x in given.parts)
    mask = scope.lanes(given.operands[3], "u16") if many else None

    def step(warp: Warp, active: Array | None) -> None:
        for lane in _active(warp, active):
            tensor = TensorMap.at(warp.machine.memory, int(of(warp)[lane]))
            place = [int(x(warp)[lane]) for x in at]
            block, start = _owner(warp, int(to(warp)[lane]))
            _, bell = _owner(warp, int(barrier(warp)[lane]))
            chosen = [block]
            if mask is not None:
                blocks = warp.block.cluster.blocks
                chosen = [b for b in blocks if int(mask(warp)[lane]) >> b.rank & 1]
            for each in chosen:
                _load_later(warp, each, tensor, place, start, bell)

    return step


def _load_later(
    warp: Warp, block: Block, tensor: TensorMap, place: list[int], start: int, bell: int
) -> None:
    places = swizzled(start, tensor.bytes, tensor.swizzle) // _CELLS
    cells = block.shared.bytes.reshape(-1, _CELLS)
    if not warp.machine.eager:
        cells[places] = 0xFF

    def work() -> None:
        cells[places] = tensor.load(warp.machine.memory, place).reshape(-1, _CELLS)
        warp.machine.moved += 1
        block.barriers[bell].arrive(0, -tensor.bytes)

    warp.machine.later(work)


def _tensor_stored(scope: Scope, given: Statement) -> Step:
    (to, at), of = _tensor_operand(scope, given.operands[0]), scope.address(given.operands[1])

    def step(warp: Warp, active: Array | None) -> None:
        for lane in _active(warp, active):
            tensor = TensorMap.at(warp.machine.memory, int(to(warp)[lane]))
            place = [int(x(warp)[lane]) for x in at]
            block, start = _owner(warp, int(of(warp)[lane]))
            places = swizzled(start, tensor.bytes, tensor.swizzle) // _CELLS
            cells = block.shared.bytes.reshape(-1, _CELLS)
            warp.later(
                "bulk",
                lambda: tensor.store(warp.machine.memory, place, cells[places]),  # noqa: B023
            )

    return step


def _multiplied(scope: Scope, given: Statement) -> Step:
    if given.parts[1] == "fence":
        return lambda warp, active: None
    if given.parts[1] in ("commit_group", "wait_group"):
        return _products.group(given)
    return _products.build(scope, given)


BUILDERS: dict[str, Callable[[Scope, Statement], Step]] = {
    "mbarrier": _mbarrier,
    "mapa": _mapped,
    "cp": _copied,
    "wgmma": _multiplied,
    "mma": _products.of_warp,
}
