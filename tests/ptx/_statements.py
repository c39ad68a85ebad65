"""Statements to what they do to a warp."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import _hopper
import _warp
import numpy as np
from _arithmetic import COMPARISONS, JOINS, operation
from _machine import Compiled, Step, Warp
from _memory import OFFSET, RANK, Fault, Global, Shared, load, store
from _text import Kernel, Statement, split
from _values import Array, Reader, Writer, dtype, poison, reader, writer

_STOPS = ("ret", "exit", "bar", "barrier")
_NOTHING = (
    "fence", "membar", "setmaxnreg", "prefetch", "createpolicy", "griddepcontrol", "discard",
)  # fmt: skip


class Scope(NamedTuple):
    """What names mean in a kernel."""

    registers: dict[str, str]
    symbols: dict[str, int]

    def read(self, name: str, kind: str | np.dtype) -> Reader:
        kind = dtype(kind) if isinstance(kind, str) else kind
        if name.startswith("!"):
            inner = self.read(name[1:], kind)
            return lambda warp: ~inner(warp)
        return reader(self.registers, name, kind, self.symbols)

    def lanes(self, name: str, kind: str | np.dtype) -> Reader:
        """One value a lane, of numbers too."""
        read = self.read(name, kind)

        def spread(warp: Warp) -> Array:
            value = read(warp)
            return value if value.ndim else np.full(warp.lanes, value)

        return spread

    def write(self, name: str) -> Writer:
        return writer(self.registers, name)

    def address(self, operand: str) -> Reader:
        """Of [%rd1+16]: int64, one a lane."""
        inside = operand.strip("[] ").split(",")[0].replace(" ", "")
        name, offset = re.fullmatch(r"([^+]+)(?:\+(-?\w+))?", inside).groups()  # type: ignore[union-attr]
        wide = name in self.symbols or self.wide(name)
        read, more = self.lanes(name, "u64" if wide else "u32"), int(offset or "0", 0)
        return lambda warp: read(warp).astype(np.int64) + more

    def wide(self, name: str) -> bool:
        kind = self.registers.get(name) or self.registers.get(name.rstrip("0123456789"), "")
        return kind.endswith("64")

    def several(self, operand: str) -> list[str]:
        """Names in braces, or the one."""
        return split(operand.strip()[1:-1]) if operand.startswith("{") else [operand]


def compiled(kernel: Kernel, symbols: dict[str, int]) -> list[Compiled]:
    scope = Scope(kernel.registers, symbols)
    return [_compiled(scope, statement, kernel.labels) for statement in kernel.code]


def _compiled(scope: Scope, given: Statement, labels: dict[str, int]) -> Compiled:
    base, target = given.parts[0], None
    step: Step = _nothing
    if base == "bra":
        target = labels[given.operands[0]]
    elif base not in _NOTHING:
        step = _step(scope, given)
    stops = base in _STOPS and given.parts[:2] != ("bar", "warp")
    stops |= given.parts[:2] == ("wgmma", "wait_group")
    return Compiled(given.text, given.guard, given.negated, target, step, stops)


def _nothing(warp: Warp, active: Array | None) -> None:
    return None


def _step(scope: Scope, given: Statement) -> Step:
    base = given.parts[0]
    build = _OWN.get(base) or _warp.BUILDERS.get(base) or _hopper.BUILDERS.get(base)
    if build is not None:
        return build(scope, given)
    try:
        function, kinds = operation(given.parts)
    except KeyError:
        return _unknown(given)
    write = scope.write(given.operands[0])
    pairs = zip(given.operands[1:], kinds, strict=False)
    reads = [scope.read(name, kind) for name, kind in pairs]

    def step(warp: Warp, active: Array | None) -> None:
        write(warp, np.asarray(function(*[read(warp) for read in reads])), active)

    return step


def _unknown(given: Statement) -> Step:
    """An error where it is run."""

    def step(warp: Warp, active: Array | None) -> None:
        raise NotImplementedError(given.text)

    return step


def _moved(scope: Scope, given: Statement) -> Step:
    """Between a register and its parts, too."""
    to, of = given.operands
    kind = dtype(given.parts[-1])
    if not (to.startswith("{") or of.startswith("{")):
        write, read = scope.write(to), scope.read(of, kind)
        return lambda warp, active: write(warp, read(warp), active)
    names = scope.several(to if to.startswith("{") else of)
    part = np.dtype(f"u{kind.itemsize // len(names)}")
    if to.startswith("{"):
        whole, writes = scope.lanes(of, kind), [scope.write(x) for x in names]

        def unpack(warp: Warp, active: Array | None) -> None:
            parts = np.ascontiguousarray(whole(warp)).view(part).reshape(warp.lanes, -1)
            for i, write in enumerate(writes):
                write(warp, parts[:, i].copy(), active)

        return unpack
    reads, write = [scope.lanes(x, part) for x in names], scope.write(to)

    def pack(warp: Warp, active: Array | None) -> None:
        parts = np.stack([read(warp) for read in reads], 1)
        write(warp, parts.view(kind)[:, 0].copy(), active)

    return pack


def _converted(scope: Scope, given: Statement) -> Step:
    """To an address of any space: those of parameters begin elsewhere."""
    write, read = scope.write(given.operands[0]), scope.read(given.operands[1], given.parts[-1])
    of_parameters = given.parts[1] == "param"

    def step(warp: Warp, active: Array | None) -> None:
        address = read(warp)
        write(warp, address + np.uint64(warp.machine.start) if of_parameters else address, active)

    return step


def _compared(scope: Scope, given: Statement) -> Step:
    compare, kind = COMPARISONS[given.parts[1]], dtype(given.parts[-1])
    join = next((JOINS[x] for x in given.parts[2:-1] if x in JOINS), None)
    writes = [scope.write(x) for x in given.operands[0].split("|")]
    reads = [scope.read(x, kind) for x in given.operands[1:3]]
    other = scope.read(given.operands[3], "pred") if join else None

    def step(warp: Warp, active: Array | None) -> None:
        found = compare(reads[0](warp), reads[1](warp))
        for write, value in zip(writes, (found, ~found), strict=False):
            write(warp, join(value, other(warp)) if join and other else value, active)

    return step


def space(warp: Warp, name: str, addresses: Array) -> tuple[Global | Shared, Array]:
    """What a state space is, and where in it these addresses are."""
    if name == "param":
        return warp.machine.memory, addresses + warp.machine.start
    if name in ("global", "const", ""):
        return warp.machine.memory, addresses
    ranks = np.unique(addresses >> RANK)
    if len(ranks) > 1:
        raise Fault("lanes in shared memories of several blocks")
    blocks = warp.block.cluster.blocks
    block = warp.block if ranks[0] == 0 else blocks[int(ranks[0]) - 1]
    return block.shared, addresses & OFFSET


def _space_of(given: Statement) -> str:
    spaces = ("param", "global", "const", "shared", "local")
    found = [x.split(":")[0] for x in given.parts if x.split(":")[0] in spaces]
    if found and found[0] == "local":
        raise NotImplementedError(given.text)
    return found[0] if found else ""


def _loaded(scope: Scope, given: Statement) -> Step:
    kind, where = dtype(given.parts[-1]), _space_of(given)
    writes = [scope.write(x) for x in scope.several(given.operands[0])]
    address = scope.address(given.operands[1])

    def step(warp: Warp, active: Array | None) -> None:
        addresses = address(warp)
        if active is not None:
            addresses = addresses[active]
        memory, addresses = space(warp, where, addresses)
        for write, value in zip(writes, load(memory, addresses, kind, len(writes)), strict=True):
            if active is not None:
                whole = np.zeros(warp.lanes, kind)
                whole[active] = value
                value = whole
            write(warp, value, active)

    return step


def _stored(scope: Scope, given: Statement) -> Step:
    kind, where = dtype(given.parts[-1]), _space_of(given)
    reads = [scope.lanes(x, kind) for x in scope.several(given.operands[1])]
    address = scope.address(given.operands[0])

    def step(warp: Warp, active: Array | None) -> None:
        chosen = slice(None) if active is None else active
        memory, addresses = space(warp, where, address(warp)[chosen])
        store(memory, addresses, [read(warp)[chosen] for read in reads])

    return step


def _atomic(scope: Scope, given: Statement) -> Step:
    """Lane after lane."""
    kind, where, name = dtype(given.parts[-1]), _space_of(given), given.parts
    returns = given.parts[0] == "atom"
    write = scope.write(given.operands[0] if returns else "_")
    address = scope.address(given.operands[int(returns)])
    value = scope.lanes(given.operands[1 + int(returns)], kind)
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add, "max": np.maximum, "min": np.minimum, "exch": lambda old, new: new,
        "or": np.bitwise_or, "and": np.bitwise_and,
    }  # fmt: skip
    function = next(functions[x] for x in name if x in functions)

    def step(warp: Warp, active: Array | None) -> None:
        chosen = np.arange(warp.lanes) if active is None else np.flatnonzero(active)
        memory, addresses = space(warp, where, address(warp)[chosen])
        found, given_ = poison(kind, warp.lanes), value(warp)
        for lane, place in zip(chosen, addresses, strict=True):
            cells, at = memory.at(np.array([place]), kind)
            found[lane] = cells[at[0]]
            cells[at[0]] = function(cells[at[0]], given_[lane])
        write(warp, found, active)

    return step


def _ended(scope: Scope, given: Statement) -> Step:
    return lambda warp, active: warp.end(np.ones(warp.lanes, bool) if active is None else active)


_OWN: dict[str, Callable[[Scope, Statement], Step]] = {
    "mov": _moved,
    "cvta": _converted,
    "setp": _compared,
    "ld": _loaded,
    "st": _stored,
    "atom": _atomic,
    "red": _atomic,
    "ret": _ended,
    "exit": _ended,
}
