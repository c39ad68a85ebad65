"""What statements read and write: registers as arrays over lanes, and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from _machine import Warp

Array = NDArray[Any]
Reader = Callable[["Warp"], Array]
Writer = Callable[["Warp", Array, "Array | None"], None]

_KINDS = {"u": "u", "s": "i", "b": "u", "f": "f"}
_POISON = 0xFF  # of what nobody has written: NaN, or a number out of every range


def dtype(name: str) -> np.dtype:
    """Of "s32", "f16" and so on; bfloat16 and its pairs are bits."""
    if name == "pred":
        return np.dtype(bool)
    if name in ("bf16", "bf16x2", "f16x2"):
        return np.dtype("u2" if name == "bf16" else "u4")
    return np.dtype(f"{_KINDS[name[0]]}{int(name[1:]) // 8}")


def unsigned(size: int) -> np.dtype:
    return np.dtype(f"u{size}")


def poison(kind: np.dtype, lanes: int) -> Array:
    if kind.kind == "b":
        return np.zeros(lanes, bool)
    return np.full(lanes * kind.itemsize, _POISON, np.uint8).view(kind)


def register_dtype(registers: dict[str, str], name: str) -> np.dtype:
    """%f12 is one of `.reg .f32 %f<13>`."""
    kind = registers.get(name) or registers[name.rstrip("0123456789")]
    return np.dtype(bool) if kind == "pred" else unsigned(int(kind.lstrip("bufs")) // 8)


def is_register(registers: dict[str, str], name: str) -> bool:
    return name in registers or name.rstrip("0123456789") in registers


def number(text: str, kind: np.dtype) -> Any:
    """A constant in the type of who reads it."""
    if bits := re.fullmatch(r"0([fF][0-9a-fA-F]{8}|[dD][0-9a-fA-F]{16})", text):
        size = 4 if bits[1][0] in "fF" else 8
        return np.array(int(bits[1][1:], 16), unsigned(size)).view(kind)[()]
    if kind.kind in "fb":
        return kind.type(int(text, 0))
    bits = int(text.rstrip("U"), 0) % 2 ** (8 * kind.itemsize)
    return np.array(bits, unsigned(kind.itemsize)).view(kind)[()]


def cast(value: Array, size: int) -> Array:
    """Bits of `size` bytes: cut, or filled up as the type of the value says."""
    if value.dtype == bool or value.dtype.itemsize == size:
        return value
    if value.dtype.kind == "f":
        value = value.view(unsigned(value.dtype.itemsize))
    return value.astype(f"{value.dtype.kind}{size}")


def writer(registers: dict[str, str], name: str) -> Writer:
    if name == "_":
        return lambda warp, value, active: None
    kind = register_dtype(registers, name)

    def write(warp: Warp, value: Array, active: Array | None) -> None:
        if value.dtype != kind:
            value = cast(value, kind.itemsize).view(kind)
        if active is not None or value.shape != (warp.lanes,):
            old = warp.registers.get(name)
            new = poison(kind, warp.lanes) if old is None else old.copy()
            np.copyto(new, value, where=True if active is None else active)
            value = new
        warp.registers[name] = value

    return write


def reader(registers: dict[str, str], name: str, kind: np.dtype, symbols: dict[str, int]) -> Reader:
    """A register, a special one, a symbol's address or a number, as `kind`."""
    if is_register(registers, name):
        own = register_dtype(registers, name)

        def read(warp: Warp) -> Array:
            value = warp.registers.get(name)
            if value is None:
                value = warp.registers[name] = poison(own, warp.lanes)
            if own.itemsize != kind.itemsize:
                return value.astype(unsigned(kind.itemsize)).view(kind)
            return value.view(kind)

        return read
    if name in symbols:
        address = np.array(symbols[name], unsigned(kind.itemsize)).view(kind)
        return lambda warp: address
    if name.startswith("%"):
        return lambda warp: warp.special(name).astype(kind)
    constant = np.array(number(name, kind))
    return lambda warp: constant
