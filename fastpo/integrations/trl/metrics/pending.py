"""What stands for a tensor or a number that a ledger is still to find.

Expressions are only written down while the ledger is open. Everywhere else, and for whatever it
does not know, a pending value first becomes what it stands for.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_METHODS = ("sum", "nansum", "mean", "float", "clamp")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")
_COMPARISONS = ("lt", "le", "eq", "ne", "ge")
_UNARY = ("neg", "abs", "invert")
_UNKNOWN = object()


class Recorder(Protocol):
    """What a pending value asks of the ledger it is written down in."""

    open: bool

    def guards(self, frame: FrameType) -> bool: ...

    def promise(self, value: PendingTensor | PendingNumber) -> bool: ...

    def keep(self, number: PendingNumber, *, result: bool) -> PendingNumber: ...

    def communicate(self) -> None: ...

    def read(self) -> None: ...


def _plain(x: Any) -> Any:
    """What a pending value stands for; anything else as it is."""
    return x.plain() if isinstance(x, _Pending) else x


class _Pending:
    __slots__ = ("_ledger", "promised")

    def __init__(self, ledger: Recorder) -> None:
        self._ledger = ledger
        self.promised = False  # taken for positive

    def plain(self) -> Any:
        raise NotImplementedError

    def kept_promise(self) -> bool:
        """Whether a division by this has to look; it does so once."""
        promised, self.promised = self.promised, False
        return promised

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain(), name)

    def __reduce__(self) -> Any:
        return _plain, (self.plain(),)

    def __repr__(self) -> str:
        return repr(self.plain())

    def __format__(self, spec: str) -> str:
        return format(self.plain(), spec)


class PendingTensor(_Pending):
    """A tensor on the device, not computed yet."""

    __slots__ = ("_compute", "_value")
    __hash__ = object.__hash__

    def __init__(self, ledger: Recorder, compute: Callable[[], Tensor]) -> None:
        super().__init__(ledger)
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None

    def plain(self) -> Tensor:
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        assert self._value is not None
        return self._value

    def apply(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Tensor's method, written down where all operands are known to stay what they are."""
        function, operands = getattr(Tensor, name), (*args, *kwargs.values())
        known = all(isinstance(x, (int, float, PendingTensor)) for x in operands)
        if not (known and self._ledger.open):
            plain, named = tree_map(_plain, (args, kwargs))
            return function(self.plain(), *plain, **named)
        quotient = {"__truediv__": args, "__rtruediv__": (self,)}.get(name, ())
        looks = [x for x in quotient if isinstance(x, PendingTensor) and x.kept_promise()]

        def compute() -> Tensor:
            plain, named = tree_map(_plain, (args, kwargs))
            found = function(self.plain(), *plain, **named)
            return torch.where(looks[0].plain() > 0, found, 0.0) if looks else found

        return PendingTensor(self._ledger, compute)

    def item(self) -> Any:
        if not self._ledger.open:
            return self.plain().item()
        return self._ledger.keep(PendingNumber(self._ledger, self.plain), result=False)

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS:
            return lambda *args, **kwargs: self.apply(name, *args, **kwargs)
        return super().__getattr__(name)

    def __gt__(self, other: Any) -> Any:
        if self._ledger.guards(sys._getframe(1)):
            return self._ledger.promise(self)
        return self.apply("__gt__", other)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return operator.index(self.plain())

    def __len__(self) -> int:
        return len(self.plain())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.plain())

    def __getitem__(self, key: Any) -> Any:
        return self.plain()[tree_map(_plain, key)]


class Gathered(PendingTensor):
    """A tensor of every process."""

    __slots__ = ("local", "rows")

    def __init__(self, ledger: Recorder, local: Tensor, rows: int | None) -> None:
        super().__init__(ledger, self._wait)
        self.local, self.rows = local, rows

    def arrive(self, value: Tensor) -> None:
        # accelerate slices, too, but leaves the scalars of a single process.
        self._value = value[: self.rows] if value.ndim else value
        self._compute = None
        del self.local

    def _wait(self) -> Tensor:
        self._ledger.communicate()
        assert self._value is not None
        return self._value


class PendingNumber(_Pending):
    """A number on the host, not fetched yet."""

    __slots__ = ("_compute", "_value", "dtype")

    def __init__(self, ledger: Recorder, compute: Callable[[], Any]) -> None:
        super().__init__(ledger)
        self._compute: Callable[[], Any] | None = compute
        self._value: Any = _UNKNOWN

    def compute(self) -> Any:
        """A number, or the tensor that holds it; what it is made of is let go."""
        assert self._compute is not None
        found = self._compute()
        if isinstance(found, Tensor):
            self.dtype = found.dtype
        self._compute = None
        return found

    def arrive(self, value: Any) -> None:
        self._value = value

    def plain(self) -> Any:
        if self._value is _UNKNOWN:
            self._ledger.read()
        if self._value is _UNKNOWN:  # the error of another number cut the reading short
            self.arrive(self.compute())
        return self._value

    def apply(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        known = all(isinstance(x, (int, float, PendingNumber)) for x in (left, right))
        if not (known and self._ledger.open):
            return function(_plain(left), _plain(right))
        looks = function is operator.truediv and isinstance(right, PendingNumber)
        looks = looks and right.kept_promise()

        def compute() -> Any:
            divisor = _plain(right)
            return 0.0 if looks and not divisor > 0 else function(_plain(left), divisor)

        return self._ledger.keep(PendingNumber(self._ledger, compute), result=True)

    def __gt__(self, other: Any) -> Any:
        if self._value is _UNKNOWN and self._ledger.guards(sys._getframe(1)):
            return self._ledger.promise(self)
        return self.plain() > _plain(other)

    def __hash__(self) -> int:
        return hash(self.plain())

    def __bool__(self) -> bool:
        return bool(self.plain())

    def __float__(self) -> float:
        return float(self.plain())

    def __int__(self) -> int:
        return int(self.plain())

    def __index__(self) -> int:
        return operator.index(self.plain())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.plain(), digits)


def _tensor_method(name: str) -> Callable[..., Any]:
    return lambda self, *args: self.apply(name, *args)


def _number_method(function: Any, reflected: bool) -> Callable[..., Any]:
    if reflected:
        return lambda self, other: self.apply(function, other, self)
    return lambda self, other: self.apply(function, self, other)


def _number_look(function: Any) -> Callable[..., Any]:
    return lambda self, *others: function(self.plain(), *map(_plain, others))


for _name in _OPERATORS:
    for _reflected in (False, True):
        _dunder = f"__{'r' if _reflected else ''}{_name}__"
        setattr(PendingTensor, _dunder, _tensor_method(_dunder))
        _method = _number_method(getattr(operator, f"__{_name}__"), _reflected)
        setattr(PendingNumber, _dunder, _method)
for _name in (*_COMPARISONS, *_UNARY):
    _dunder = f"__{_name}__"
    setattr(PendingTensor, _dunder, _tensor_method(_dunder))
    setattr(PendingNumber, _dunder, _number_look(getattr(operator, _dunder)))
