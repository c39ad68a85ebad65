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
from torch.autograd.function import once_differentiable


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
        index = torch.zeros(targets, dtype=torch.int64)
        merged = _merged(runs)
        for run in merged:
            numbers = torch.arange(run.source, run.source + run.length, dtype=torch.int64)
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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies, dim: int) -> Tensor:
        ctx.copies, ctx.dim = copies, dim
        return x.index_select(dim, copies.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        copies, dim = ctx.copies, ctx.dim
        shape = list(grad.shape)
        shape[dim] = copies.size
        total = grad.new_zeros(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for run in copies.runs:
            part = total.narrow(dim, run.source, run.length)
            part.add_(grad.narrow(dim, run.target, run.length))
        return total.to(grad.dtype), None, None
