"""What the primitives cannot be differentiated by is refused, in the same words by all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def first_derivatives(
    name: str, found: tuple[Tensor | None, ...], sources: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that a backward has found from `sources`, for it to return.

    Under create_graph=True they depend on all sources, and who differentiates them is told so.
    PyTorch's once_differentiable leaves them constant where the incoming gradient is one.
    """
    if not torch.is_grad_enabled():
        return found
    refused: tuple[Tensor | None, ...] = _Refusal.apply(name, found, *sources)
    return refused


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, found: tuple[Tensor | None, ...], *sources: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.name}: expected first derivatives only, got a derivative of its gradient "
            "(create_graph=True)"
        )
