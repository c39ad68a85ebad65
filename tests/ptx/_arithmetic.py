"""Instructions that compute lane by lane: of parts and operands' types to a function of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from _values import Array, dtype, unsigned

Function = Callable[..., Array]


class Operation(NamedTuple):
    function: Function
    given: tuple[np.dtype, ...]  # as the operands are read


def fused(a: Array, b: Array, c: Array) -> Array:
    """One rounding: of float32 through float64, where products are exact."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b + c).astype(a.dtype)


def fused_down(a: Array, b: Array, c: Array) -> Array:
    """Towards minus infinity."""
    exact = a.astype(np.float64) * b + c
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def bfloat16_bits(x: Array) -> Array:
    """To the nearest, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _divided(a: Array, b: Array) -> Array:
    if a.dtype.kind != "i":
        return a // b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _remainder(a: Array, b: Array) -> Array:
    return a - _divided(a, b) * b


def _high(a: Array, b: Array) -> Array:
    if a.dtype.itemsize == 4:
        wide = np.dtype(f"{a.dtype.kind}8")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(a.dtype)
    product = np.asarray(a).astype(object) * np.asarray(b).astype(object)
    return np.asarray(product >> 64 if product.shape else int(product) >> 64).astype(a.dtype)


def _shifted(a: Array, by: Array, left: bool) -> Array:
    bits = 8 * a.dtype.itemsize
    some = np.minimum(by, bits - 1).astype(a.dtype)
    shifted = a << some if left else a >> some
    return shifted if a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), shifted)


def _field(a: Array, start: Array, length: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    start, length = np.minimum(start & 255, bits), np.minimum(length & 255, bits)
    whole = a.astype(object) if bits == 64 else a.astype(np.int64)
    found = np.where(start < bits, whole >> np.minimum(start, bits - 1).astype(np.int64), 0)
    size = 1 << length.astype(np.int64)
    found = found & (size - 1)
    if a.dtype.kind == "i":
        found = np.where((length > 0) & (found >= size // 2), found - size, found)
    return found.astype(a.dtype)


def _inserted(a: Array, b: Array, start: Array, length: Array) -> Array:
    mask = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << length.astype(np.uint64)) - 1)
    mask = (mask.astype(np.uint64) << start.astype(np.uint64)).astype(b.dtype)
    moved = _shifted(a, start, left=True)
    return (b & ~mask) | (moved & mask)


def _larger(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def _smaller(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


COMPARISONS: dict[str, Function] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
JOINS: dict[str, Function] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}
_TWO: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "min": _smaller, "max": _larger, "rem": _remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip
_ONE: dict[str, Function] = {
    "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh,
}  # fmt: skip


def operation(parts: tuple[str, ...]) -> Operation:
    """A KeyError where there is none."""
    base, kind = parts[0], dtype(parts[-1])
    if base == "cvt":
        return _conversion(parts)
    function = _plain(base, parts, kind)
    given: tuple[np.dtype, ...] = (kind,) * 3
    if base in ("shl", "shr"):
        given = (kind, np.dtype("u4"))
    elif base in ("bfe", "bfi"):
        given = (kind,) * (1 if base == "bfe" else 2) + (np.dtype("u4"),) * 2
    elif base == "selp":
        given = (kind, kind, np.dtype(bool))
    elif base in ("mul", "mad") and "wide" in parts:
        given = (kind, kind, np.dtype(f"{kind.kind}{2 * kind.itemsize}"))
    if "ftz" in parts and kind == np.float32:
        unflushed = function
        function = lambda *x: flushed(unflushed(*map(flushed, x)))  # noqa: E731
    return Operation(function, given)


def _plain(base: str, parts: tuple[str, ...], kind: np.dtype) -> Function:
    if base in ("mul", "mad"):
        return _product(base, parts, kind)
    if base == "fma":
        return fused_down if "rm" in parts else fused
    if base == "div":
        return np.divide if kind.kind == "f" else _divided
    if base in ("min", "max") and "NaN" in parts:
        return np.minimum if base == "min" else np.maximum
    if base == "not":
        return np.logical_not if kind.kind == "b" else np.invert
    if base in ("shl", "shr"):
        return lambda a, by: _shifted(a, by, base == "shl")
    if base == "selp":
        return lambda a, b, p: np.where(p, a, b)
    others = {"bfe": _field, "bfi": _inserted}
    return (others | _TWO | _ONE)[base]


def _product(base: str, parts: tuple[str, ...], kind: np.dtype) -> Function:
    function: Function = np.multiply
    if "hi" in parts:
        function = _high
    elif "wide" in parts:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        function = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    return function if base == "mul" else lambda a, b, c: function(a, b) + c


def _conversion(parts: tuple[str, ...]) -> Operation:
    to, given = parts[-2], parts[-1]
    if to in ("bf16x2", "f16x2"):
        half = bfloat16_bits if to == "bf16x2" else _half_bits

        def pair(high: Array, low: Array) -> Array:
            return half(low).astype(np.uint32) | (half(high).astype(np.uint32) << np.uint32(16))

        return Operation(pair, (dtype(given),) * 2)
    rounds = {"rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc, "rni": np.rint}
    rounded = next((rounds[x] for x in parts if x in rounds), None)

    def convert(x: Any) -> Array:
        if given == "bf16":
            x = from_bfloat16(x)
        if rounded is not None:
            x = rounded(x)
        if to == "bf16":
            return bfloat16_bits(x)
        if "sat" in parts:
            x = np.nan_to_num(np.clip(x, 0, 1), nan=0.0)
        if dtype(given).kind == "f" and dtype(to).kind in "iu":
            limits = np.iinfo(dtype(to))
            x = np.clip(np.nan_to_num(x.astype(np.float64)), limits.min, limits.max)
        return np.asarray(x).astype(dtype(to))

    return Operation(convert, (dtype(given),))


def _half_bits(x: Array) -> Array:
    return x.astype(np.float16).view(unsigned(2))
