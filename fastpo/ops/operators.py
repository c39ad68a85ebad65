"""The walks of a primitive as operators: a compiler would trace their loops tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .walks.vocab_shard import VocabShard

_Tensors = Sequence[Tensor | None]
_BOTH = "Tensor?[] rows, Tensor?[] tensors"


@dataclass(frozen=True)
class Call:
    """What is not a tensor in one call of a primitive.  name: who errors are of."""

    name: str
    options: tuple  # as the schema has them
    shard: VocabShard | None = None

    def runs(self, whole: Any, operator: Any, rows: _Tensors) -> Any:
        """`whole`, or the operator of it, which knows no shard, in a graph."""
        if self.shard is not None:
            return partial(whole, shard=self.shard)
        labels = rows[0]  # of fake tensors, too, or tensors that hold nothing
        traced = torch.compiler.is_compiling() or type(labels) is not Tensor or labels.is_meta
        return operator if traced else whole


class Operators:
    """forward and backward of a primitive, called as they are, or as two operators of a graph."""

    def __init__(
        self,
        name: str,
        options: str,
        *,
        spec: Callable[..., Any],
        forward: Callable[..., Sequence[Tensor]],
        backward: Callable[..., _Tensors],
        fake: Callable[..., Sequence[Tensor]],
    ) -> None:
        """options: their schema; PyTorch's custom operators take tensors and plain values only.

        spec(rows, *options, shard): what the others are called with last.
        forward(rows, tensors, spec): results and what is saved, no arguments among them.
            rows: what has no gradient, the labels [N] first.  tensors: the others.
        fake: the same of tensors that hold nothing.
        backward(grads, rows, tensors, saved, needs, spec): of each of `tensors`, None where it
            needs none; grads and saved as forward gave them.
        """

        def ahead(rows: Any, tensors: Any, *given: Any, shard: Any = None) -> list[Tensor]:
            return list(forward(rows, tensors, spec(rows, *given, shard=shard)))

        def back(*given: Any, shard: Any = None) -> list[Tensor]:
            (grads, rows, tensors, saved, needs), given = given[:5], given[5:]
            own = spec(rows, *given, shard=shard)
            found = backward(grads, rows, tensors, saved, needs, own)
            return _results(found, tensors, saved)

        def fake_ahead(rows: Any, tensors: Any, *given: Any) -> list[Tensor]:
            return list(fake(rows, tensors, spec(rows, *given, shard=None)))

        taken = f"{_BOTH}, {options}"
        self._forward = ahead, _operator(name, taken, ahead, fake_ahead)
        taken = f"Tensor?[] grads, {_BOTH}, Tensor[] saved, bool[] needs, {options}"
        self._backward = back, _operator(f"{name}_backward", taken, back, _fake_back)

    def forward(self, call: Call, rows: _Tensors, tensors: _Tensors) -> Sequence[Tensor]:
        return call.runs(*self._forward, rows)(rows, tensors, *call.options)

    def backward(
        self,
        call: Call,
        grads: _Tensors,
        rows: _Tensors,
        tensors: _Tensors,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Of each of `tensors`, None where it needs none."""
        run = call.runs(*self._backward, rows)
        found = run(grads, rows, tensors, saved, needs, *call.options)
        return tuple(x if need else None for x, need in zip(found, needs, strict=True))


def apart(tensors: _Tensors) -> list[Tensor | None]:
    """No tensor twice: a compiler takes none as two inputs of one function."""
    found: list[Tensor | None] = []
    for x in tensors:
        again = any(x is y for y in found)
        found.append(x.view_as(x) if x is not None and again else x)
    return found


def _results(found: _Tensors, tensors: _Tensors, saved: Sequence[Tensor]) -> list[Tensor]:
    """In the dtype of their tensors; an operator has no result that is None."""
    return [
        saved[0].new_empty(0) if x is None or own is None else x.to(own.dtype)
        for x, own in zip(found, tensors, strict=True)
    ]


def _fake_back(
    grads: Any, rows: Any, tensors: _Tensors, saved: Any, needs: Sequence[bool], *_: Any
) -> list[Tensor]:
    pairs = zip(tensors, needs, strict=True)
    found = [None if x is None or not need else x.new_empty(x.shape) for x, need in pairs]
    return _results(found, tensors, saved)


def _operator(name: str, taken: str, function: Any, fake: Any) -> Any:
    schema = f"({taken}) -> Tensor[]"
    made = torch.library.custom_op(f"fastpo::{name}", function, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made
