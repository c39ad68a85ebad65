"""Copies of tokens to several places, and the sum of what comes back.

A prompt's token is read by every row that begins with it, so its gradient has as many addends: they
are summed in float32 in a fixed order and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Made on the host, whatever PyTorch's default device is.
PLACES: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}


class Run(NamedTuple):
    """`length` neighbours from `source` on, to `target` on."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, eq=False)
class Copies:
    """From `size` places to as many as `index` has; places without a run get the first."""

    runs: tuple[Run, ...]
    size: int
    index: Tensor  # int64

    @classmethod
    def of(cls, runs: Sequence[Run], size: int, targets: int, device: torch.device) -> Copies:
        index, merged = torch.zeros(targets, **PLACES), _merged(runs)
        for run in merged:
            numbers = torch.arange(run.source, run.source + run.length, **PLACES)
            index[run.target : run.target + run.length] = numbers
        return cls(merged, size, index.to(device, non_blocking=True))

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        if self.runs == (Run(0, 0, self.size),) and len(self.index) == self.size:
            return x  # every place is its own
        found: Tensor = _Gather.apply(x, self, dim)
        return found


def _merged(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs that go on where the one before ended, as one."""
    found: list[Run] = []
    for run in runs:
        if found:
            last = found[-1]
            if (last.source + last.length, last.target + last.length) == run[:2]:
                found[-1] = Run(last.source, last.target, last.length + run.length)
                continue
        found.append(run)
    return tuple(found)


class _Linear(torch.autograd.Function):
    """Of x, copies and dim; linear in x, so that it is its own derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.copies, ctx.dim = inputs


class _Gather(_Linear):
    @staticmethod
    def forward(x: Tensor, copies: Copies, dim: int) -> Tensor:
        return x.index_select(dim, copies.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(grad, ctx.copies, ctx.dim), None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: None) -> Tensor:
        found: Tensor = _Gather.apply(x, ctx.copies, ctx.dim)
        return found


class _Sum(_Linear):
    @staticmethod
    def forward(x: Tensor, copies: Copies, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = copies.size
        total = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
        for run in copies.runs:
            part = total.narrow(dim, run.source, run.length)
            part.add_(x.narrow(dim, run.target, run.length))
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        copies, dim = ctx.copies, ctx.dim
        filled = torch.zeros_like(copies.index, dtype=torch.bool)
        for run in copies.runs:
            filled[run.target : run.target + run.length] = True
        index = filled.logical_not().nonzero().squeeze(1)  # places without a run have no gradient
        gathered: Tensor = _Gather.apply(grad, copies, dim)
        return gathered.index_fill(dim, index, 0), None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: None) -> Tensor:
        found: Tensor = _Sum.apply(x, ctx.copies, ctx.dim)
        return found
