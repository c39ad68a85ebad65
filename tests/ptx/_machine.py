"""Runs kernels of PTX text on the host, warp by warp, with the values and addresses of a GPU.

A warp's lanes that are at the same statement run it together, those furthest behind first. Warps
take turns where they wait. What the hardware copies or multiplies by itself is late, done when
nothing else can go on; until then its destination is poison, so that a missing wait is seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from _memory import Fault, Global, Shared
from _text import Kernel, Module
from _values import Array

LANES = 32
_ENDED = np.iinfo(np.int64).max
_ALIGNMENT = 64  # of arguments

# True: not yet, once more when the warp's turn comes.
Step = Callable[["Warp", "Array | None"], "bool | None"]


class Size(NamedTuple):
    x: int = 1
    y: int = 1
    z: int = 1

    @property
    def count(self) -> int:
        return self.x * self.y * self.z

    def place(self, i: int) -> Size:
        return Size(i % self.x, i // self.x % self.y, i // self.x // self.y)


class Launch(NamedTuple):
    grid: Size
    threads: int
    shared: int = 0  # bytes beside those of a size known in the text
    cluster: Size = Size()


@dataclass
class Manner:
    """How kernels are run."""

    eager: bool = False  # what is asynchronous is done at once
    seed: int | None = None  # warps take turns in any order, wherever they are
    allowed: Callable[[], list[tuple[int, int]]] | None = None  # memory with its end, see Global


class Wait(NamedTuple):
    """Lanes of a block that have come to one of its barriers."""

    arrived: int
    warps: list[tuple[Warp, Array]]


class Block:
    def __init__(self, machine: Machine, index: Size, rank: int, cluster: Cluster) -> None:
        self.machine, self.index, self.rank, self.cluster = machine, index, rank, cluster
        self.shared = Shared(machine.module.static + machine.launch.shared)
        self.waits: dict[int, Wait] = {}
        self.barriers: dict[int, Any] = {}  # of shared memory, see _hopper.py
        self.warps = [Warp(self, i) for i in range(0, machine.launch.threads, LANES)]

    def arrive(self, barrier: int, expected: int, warp: Warp, lanes: Array, waits: bool) -> None:
        wait = self.waits.get(barrier, Wait(0, []))
        self.waits[barrier] = arrived(wait, expected, warp, lanes, waits)


def arrived(wait: Wait, expected: int, warp: Warp, lanes: Array, waits: bool = True) -> Wait:
    """All that wait go on when `expected` have come."""
    warp.machine.moved += 1
    warps = wait.warps
    if waits:
        warp.waiting |= lanes
        warps = [*warps, (warp, lanes)]
    wait = Wait(wait.arrived + int(lanes.sum()), warps)
    if wait.arrived < expected:
        return wait
    for each, some in wait.warps:
        each.waiting &= ~some
    return Wait(0, [])


class Cluster:
    """Blocks that run at the same time."""

    def __init__(self, machine: Machine, first: Size) -> None:
        size = machine.launch.cluster
        places = [size.place(i) for i in range(size.count)]
        at = [Size(first.x + p.x, first.y + p.y, first.z + p.z) for p in places]
        self.blocks = [Block(machine, index, i, self) for i, index in enumerate(at)]
        self.wait = Wait(0, [])
        self.lanes = size.count * machine.launch.threads


class Warp:
    """A warp."""

    def __init__(self, block: Block, first: int) -> None:
        self.block, self.machine = block, block.machine
        self.lanes = min(LANES, block.machine.launch.threads - first)
        self.first = first  # thread of the block
        self.registers: dict[str, Array] = {}
        self.at = np.zeros(self.lanes, np.int64)  # statements
        self.waiting = np.zeros(self.lanes, bool)
        self.spins = False  # asked for what has not come yet
        # Groups by kind of what is not done yet, and the one that is not closed.
        self.asynchronous: dict[str, list[list[Callable[[], None]]]] = {}
        self.opened: dict[str, list[Callable[[], None]]] = {}
        self.products: dict[tuple[str, ...], Any] = {}  # by registers, see _products.py
        self.closed = 0  # groups of products

    def special(self, name: str) -> Array:
        launch, block = self.machine.launch, self.block
        if name == "%laneid":
            return np.arange(self.lanes)
        if name == "%tid.x":
            return self.first + np.arange(self.lanes)
        kind, _, axis = name.partition(".")
        sizes = {
            "%tid": Size(0, 0, 0),
            "%ntid": Size(launch.threads),
            "%ctaid": block.index,
            "%nctaid": launch.grid,
            "%cluster_ctaid": launch.cluster.place(block.rank),
            "%cluster_nctaid": launch.cluster,
            "%clusterid": Size(*(a // b for a, b in zip(block.index, launch.cluster, strict=True))),
            "%nclusterid": Size(
                *(a // b for a, b in zip(launch.grid, launch.cluster, strict=True))
            ),
        }
        plain = {"%cluster_ctarank": block.rank, "%cluster_nctarank": launch.cluster.count}
        return np.array(plain[name] if name in plain else getattr(sizes[kind], axis))

    def run(self, statements: int) -> None:
        """So many, or until every lane waits, has ended, or asks in vain."""
        self.spins = False
        while not self.spins:
            ready = ~self.waiting & (self.at != _ENDED)
            if not ready.any():
                return
            if statements <= 0:
                self.machine.moved += 1
                return
            at = int(self.at[ready].min())
            active = ready & (self.at == at)
            others = self.at[ready & ~active]
            stop = int(others.min()) if len(others) else _ENDED
            statements -= self.together(at, active, min(stop, at + statements))

    def together(self, first: int, active: Array, stop: int) -> int:
        """These lanes, up to a branch or where others are; how many statements that took."""
        at, code, everyone = first, self.machine.code, None if active.all() else active
        while True:
            statement = code[at]
            chosen = everyone
            if statement.guard is not None:
                asked = self.registers[statement.guard] ^ statement.negated
                chosen = asked if everyone is None else asked & everyone
                if chosen.all():
                    chosen = None
            if chosen is None or chosen.any():
                some = active if chosen is None else chosen
                if statement.target is not None:
                    self.at[active] = at + 1
                    self.at[some] = statement.target
                    return at + 1 - first
                if statement.stops:
                    self.at[active] = at
                if statement.step(self, chosen):
                    self.spins = True
                if statement.stops:
                    if self.spins:
                        return at + 1 - first
                    self.at[active & (self.at == at)] = at + 1
                    return at + 1 - first
            at += 1
            if at >= stop or self.spins:
                self.at[active] = at
                return at - first

    def end(self, lanes: Array) -> None:
        self.at[lanes] = _ENDED
        if (self.at == _ENDED).all():
            self.drain()
        self.machine.moved += 1

    def later(self, kind: str, work: Callable[[], None]) -> None:
        """With the group that is open; at once where nothing is late."""
        if self.machine.eager:
            work()
        else:
            self.opened.setdefault(kind, []).append(work)

    def close(self, kind: str) -> None:
        """The group that is open."""
        self.asynchronous.setdefault(kind, []).append(self.opened.pop(kind, []))

    def drain(self, kind: str | None = None, left: int = 0) -> None:
        """Completes asynchronous work of this warp, but for the last groups."""
        for name in list(self.asynchronous) if kind is None else [kind]:
            groups = self.asynchronous.get(name, [])
            while len(groups) > left:
                for work in groups.pop(0):
                    work()

    @property
    def ended(self) -> bool:
        return bool((self.at == _ENDED).all())


class Compiled(NamedTuple):
    text: str
    guard: str | None
    negated: bool
    target: int | None  # of a branch
    step: Step
    stops: bool  # may move lanes, or let them wait


class Machine:
    def __init__(
        self,
        module: Module,
        kernel: str,
        launch: Launch,
        arguments: list[bytes],
        manner: Manner,
    ) -> None:
        from _statements import compiled

        self.module, self.launch, self.eager = module, launch, manner.eager
        self.random = None if manner.seed is None else np.random.default_rng(manner.seed)
        self.kernel: Kernel = module.kernels[kernel]
        self.moved = 0  # counts what may let a waiting warp go on
        self.pending: list[Callable[[], None]] = []
        self.parameters = _buffer(self.kernel, arguments)
        self.start = -(-ctypes.addressof(self.parameters) // _ALIGNMENT) * _ALIGNMENT
        own = [(self.start, ctypes.addressof(self.parameters) + len(self.parameters))]
        symbols = {parameter.name: parameter.offset for parameter in self.kernel.parameters}
        self.memory = Global(own + manner.allowed() if manner.allowed else None)
        self.code = compiled(self.kernel, symbols | module.shared)

    def run(self) -> None:
        grid, size = self.launch.grid, self.launch.cluster
        clusters = Size(*(-(-a // b) for a, b in zip(grid, size, strict=True)))
        with np.errstate(all="ignore"):
            for i in range(clusters.count):
                place = clusters.place(i)
                first = Size(place.x * size.x, place.y * size.y, place.z * size.z)
                self.run_cluster(Cluster(self, first))

    def run_cluster(self, cluster: Cluster) -> None:
        warps = [warp for block in cluster.blocks for warp in block.warps]
        while warps:
            before = self.moved
            for warp in warps if self.random is None else self.random.permutation(warps):
                try:
                    warp.run(_ENDED if self.random is None else self.random.integers(1, 300))
                except Exception as error:
                    raise Fault(f"{error}, at\n{self.where(warp)}") from error
            warps = [warp for warp in warps if not warp.ended]
            if self.moved == before:
                if not self.pending:
                    raise Fault("deadlock:\n" + "\n".join(map(self.where, warps)))
                self.pending.pop(0)()
        if self.pending:
            raise Fault("blocks have ended before the copies they asked for")

    def later(self, work: Callable[[], None]) -> None:
        """What the hardware does by itself, whenever it likes."""
        if self.eager:
            work()
        else:
            self.pending.append(work)

    def where(self, warp: Warp) -> str:
        at = sorted(set(warp.at[warp.at != _ENDED].tolist()))
        texts = [f"{i}: {self.code[i].text[:120]}" for i in at]
        return f"block {tuple(warp.block.index)} thread {warp.first}: " + " | ".join(texts)


def _buffer(kernel: Kernel, arguments: list[bytes]) -> Any:
    """Arguments in memory, from the first aligned address on."""
    last = kernel.parameters[-1]
    raw = (ctypes.c_char * (last.offset + last.size + _ALIGNMENT))()
    start = -ctypes.addressof(raw) % _ALIGNMENT
    for parameter, given in zip(kernel.parameters, arguments, strict=True):
        if len(given) != parameter.size:
            raise Fault(f"{parameter.name}: expected {parameter.size} bytes, got {len(given)}")
        raw[start + parameter.offset : start + parameter.offset + parameter.size] = given
    return raw
