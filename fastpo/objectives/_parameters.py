"""Hyperparameters: what each may be, read from the annotations of keyword-only parameters."""

import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from torch import Tensor

_NUMBERS: dict[Any, Any] = {float: Real, int: Integral}
# One of a kind, and many.
_WORDS: dict[Any, tuple[str, str]] = {
    float: ("a number in ", "numbers in "),
    int: ("an integer in ", "integers in "),
    bool: ("True or False", "True or False"),
    str: ("a string", "strings"),
    None: ("any value", "values"),
}


@dataclass(frozen=True)
class Interval:
    """Numbers between low and high; bounds as in mathematics: "[)" leaves high out."""

    low: float
    high: float
    bounds: str = "[]"

    def __contains__(self, value: Any) -> bool:
        above = self.low <= value if self.bounds[0] == "[" else self.low < value
        below = value <= self.high if self.bounds[1] == "]" else value < self.high
        return bool(above and below)

    def __str__(self) -> str:
        return f"{self.bounds[0]}{self.low:g}, {self.high:g}{self.bounds[1]}"


class OneOf(tuple[Any, ...]):
    """A closed list of choices."""

    def __new__(cls, *choices: Any) -> "OneOf":
        return super().__new__(cls, choices)

    def __str__(self) -> str:
        return ", ".join(map(str, self))


Positive = Interval(0, math.inf, "()")
NonNegative = Interval(0, math.inf, "[)")
Unit = Interval(0, 1)
Finite = Interval(-math.inf, math.inf, "()")
NumGroups = Annotated[int | None, NonNegative]


@dataclass(frozen=True)
class Parameter:
    """One hyperparameter: what it may be, and the sentence that says so."""

    name: str
    kind: type | None  # float, int, bool, str; None: anything
    range: Interval | OneOf | None
    optional: bool
    listed: bool = False  # a list of that kind

    @classmethod
    def of(cls, parameter: inspect.Parameter, hint: Any) -> "Parameter":
        members = _members(hint)
        optional = (type(None), None) in members
        (option, range_), *others = [x for x in members if x[0] is not type(None)]
        if option is Any and type(parameter.default) in _WORDS:
            option = type(parameter.default)
        if others and (_each(option) or isinstance(range_, OneOf)):
            option, range_ = Any, None  # they may be anything
        each = _each(option)
        if each is not None:
            option, own = each
            range_ = own or range_
        if isinstance(range_, OneOf) and None in range_:
            optional, range_ = True, OneOf(*(x for x in range_ if x is not None))
        kind = option if option in _WORDS else None
        if range_ is None and kind in _NUMBERS:
            range_ = Finite
        return cls(parameter.name, kind, range_, optional, each is not None)

    @property
    def expected(self) -> str:
        if isinstance(self.range, OneOf):
            text = f"one of {self.range}"
        else:
            text = _WORDS[self.kind][self.listed] + str(self.range or "")
        return "a list of " * self.listed + text + (" or None" if self.optional else "")

    def admits(self, value: Any) -> bool:
        if self.listed and value is not None:
            return isinstance(value, (list, tuple)) and all(map(self._admits_one, value))
        free = self.kind is None and self.range is None and not self.listed
        if value is None:
            return self.optional or free
        if isinstance(value, Tensor):  # its value stays on the device: only where all are good
            return free or (self.range is Finite and value.ndim == 0)
        return self._admits_one(value)

    def _admits_one(self, value: Any) -> bool:
        kind = _NUMBERS.get(self.kind, self.kind)
        if kind in (Real, Integral) and isinstance(value, bool):
            return False
        known = kind is None or isinstance(value, kind)
        return known and (self.range is None or value in self.range)

    def check(self, value: Any) -> None:
        if not self.admits(value):
            raise ValueError(f"{self.name}: expected {self.expected}, got {value!r}")


def _members(hint: Any) -> list[tuple[Any, Any]]:
    """The types of a union, each with its range, of which there may be none.

    `Annotated` stands around a union or in it: Python 3.10 writes `| None` around the whole hint of
    what defaults to None.
    """
    inner, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        members = _members(inner[0])
        return [(x, None if x is type(None) else own or inner[1]) for x, own in members]
    if origin in (Union, UnionType):
        return [member for x in inner for member in _members(x)]
    if origin is Literal:
        kinds = {type(x) for x in inner if x is not None}
        return [(kinds.pop() if len(kinds) == 1 else Any, OneOf(*inner))]
    return [(hint, None)]


def _each(option: Any) -> tuple[Any, Any] | None:
    """Type and range of what a list holds; None for what is no list."""
    inner, origin = get_args(option), get_origin(option) or option
    if origin not in (Sequence, list) and (origin is not tuple or inner[1:] != (...,)):
        return None
    members = _members(inner[0]) if inner else []
    return members[0] if len(members) == 1 else (Any, None)


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The keyword-only parameters of a function, with their ranges.

    Hints of the others are not evaluated: `Tensor` may be imported for a type checker alone.
    """
    given = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    written = {n: p.annotation for n, p in given.items() if p.annotation is not p.empty}
    ns = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        hints = typing.get_type_hints(SimpleNamespace(__annotations__=written), ns, None, True)
    except NameError as error:  # `from __future__ import annotations` keeps the text alone
        raise ValueError(
            f"{function.__qualname__}: expected annotations of names that its module has, "
            f"got one of {error.name}"
        ) from error
    return {
        name: Parameter.of(parameter, hints.get(name, Any)) for name, parameter in given.items()
    }
