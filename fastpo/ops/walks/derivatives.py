"""What the primitives have: first derivatives, backwards. The rest is refused, never wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def check_plain(name: str, tensors: Iterable[Tensor | None]) -> None:
    """RuntimeError for what a transform hands in: forward-mode AD would find tangents of zero."""
    for x in tensors:
        found = transform(x) if isinstance(x, Tensor) else None
        if found is not None:
            raise refused(name, found)


def refused(name: str, inside: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: expected tensors outside torch.func and forward-mode AD, got one inside {inside}"
    )


def transform(x: Tensor) -> str | None:
    """Which transform handed it in; None for an ordinary tensor."""
    # A compiler traces through torch.func; what it leaves of vmap, the operator's own rule refuses.
    if not torch.compiler.is_compiling():
        functorch = torch._C._functorch
        # torch.autograd.grad(..., is_grads_batched=True) has a vmap of its own.
        if functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x):
            return "torch.func.vmap"
        if functorch.is_gradtrackingtensor(x):
            return "torch.func.grad, vjp or jvp"
    return None if forward_ad.unpack_dual(x).tangent is None else "forward-mode AD"


def transforming() -> bool:
    """Is torch.func or forward-mode AD at work, with whatever tensors?"""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def outside_transforms() -> AbstractContextManager[Any]:
    """Where tensors that were there before torch.func began are computed further."""
    return temporarily_clear_interpreter_stack() if transforming() else nullcontext()


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
