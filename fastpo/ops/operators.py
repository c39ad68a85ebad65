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
        forward: Callable[..., Sequence[Tensor]],
        backward: Callable[..., Sequence[Tensor]],
        fake: Callable[..., Sequence[Tensor]],
    ) -> None:
        """Both may be given `shard`, too, and give back tensors that are no arguments.

        options: their schema; PyTorch's custom operators take tensors and plain values only.
        forward(rows, tensors, *options): results and what is saved.  rows: what has no gradient,
            the labels [N] first.  tensors: the others.  fake: of tensors that hold nothing.
        backward(grads, rows, tensors, saved, needs, *options): of each of `tensors`, empty where
            it needs none; grads and saved as forward gave them.
        """
        given = f"Tensor?[] rows, Tensor?[] tensors, {options}"
        back = "Tensor?[] grads, Tensor?[] rows, Tensor?[] tensors, Tensor[] saved, bool[] needs"
        self._forward = forward, _operator(name, forward, given)
        self._backward = backward, _operator(f"{name}_backward", backward, f"{back}, {options}")
        self._forward[1].register_fake(fake)
        self._backward[1].register_fake(_fake_backward)

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


def or_empty(found: _Tensors, like: Tensor) -> list[Tensor]:
    """An operator has no result that is None."""
    return [like.new_empty(0) if x is None else x for x in found]


def _operator(name: str, function: Callable[..., Any], given: str) -> Any:
    schema = f"({given}) -> Tensor[]"
    return torch.library.custom_op(f"fastpo::{name}", function, mutates_args=(), schema=schema)


def _fake_backward(
    grads: Any, rows: _Tensors, tensors: _Tensors, saved: Any, needs: Sequence[bool], *_: Any
) -> list[Tensor]:
    found = [
        x.new_empty(x.shape) if x is not None and need else None
        for x, need in zip(tensors, needs, strict=True)
    ]
    return or_empty(found, saved[0])
