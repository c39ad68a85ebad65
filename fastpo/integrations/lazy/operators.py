"""What Python looks up on the class of `LazyLogits`, past its `__getattr__`; changes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg"),
    *("matmul", "rmatmul", "floordiv", "mod", "abs", "invert", "and", "or", "xor"),
    *("eq", "ne", "lt", "le", "gt", "ge", "getitem", "len", "iter", "bool", "float", "array"),
)


class Operators:
    """Every operator of a tensor, on full logits; `LazyLogits` has some of its own."""

    _fallback: Callable[..., Any]
    real: Callable[[str], Tensor]

    def __setitem__(self, index: Any, value: Any) -> None:
        settle(self, "__setitem__").tensor[index] = value

    __hash__ = object.__hash__


class Settled:
    """What becomes of `LazyLogits` changed in place: the changed tensor, under the same name."""

    tensor: Tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tensor":
            raise AttributeError(name)
        return getattr(self.tensor, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor[index] = value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        real = tree_map_only(cls, lambda x: x.tensor, (args, kwargs or {}))
        return func(*real[0], **real[1])

    __hash__ = object.__hash__


def settle(logits: Operators, name: str) -> Settled:
    """From here on this object is a tensor; views of it taken before are not changed with it."""
    tensor = logits.real(name)
    vars(logits).clear()
    vars(logits)["tensor"] = tensor
    settled: Any = logits
    object.__setattr__(settled, "__class__", Settled)
    return settled


def _on_logits(name: str) -> Callable[..., Any]:
    def operator(self: Operators, *args: Any) -> Any:
        return self._fallback(name, *args)

    return operator


def _on_settled(name: str) -> Callable[..., Any]:
    def operator(self: Settled, *args: Any) -> Any:
        return getattr(self.tensor, name)(*args)

    return operator


for _name in (f"__{operator}__" for operator in _OPERATORS):
    setattr(Operators, _name, _on_logits(_name))
    setattr(Settled, _name, _on_settled(_name))


def leading_index(index: Any, ndim: int) -> Any:
    """The index without its part for the vocabulary, which must be all of it; else None."""
    parts = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(_consumes(part) for part in parts)
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if dots:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (ndim - consumed)
        consumed = ndim
    if consumed == ndim:
        last = parts.pop()
        if not (isinstance(last, slice) and last == slice(None)):
            return None
    return tuple(parts)


def _consumes(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    boolean = isinstance(part, Tensor) and part.dtype == torch.bool
    return part.ndim if boolean else 1
