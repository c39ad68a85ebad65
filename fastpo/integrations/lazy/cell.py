"""One promise's logits: computed when something needs all of them, and kept from then on."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...ops.walks.saving import saving_hooks
from .promise import Promise

_log = logging.getLogger(__name__)
told: set[str] = set()


class Graph:
    """From the operands of a head to its logits, and back; holds no logits itself."""

    def __init__(self, promise: Promise) -> None:
        self.promise = promise
        self.leaves: tuple[Tensor | None, ...] = ()
        self.edge: Any = None

    def logits(self) -> Tensor:
        """The logits [..., V], without a graph of their own."""
        self.leaves = tuple(
            None if x is None else x.detach().requires_grad_(x.requires_grad)
            for x in self.promise.base.operands
        )
        with torch.inference_mode(False), torch.enable_grad(), _uncounted():
            made = self.promise.on(self.leaves).materialize()
        if made.requires_grad:
            self.edge = torch.autograd.graph.get_gradient_edge(made)
        return made.detach()

    def gradients(self, grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Of hidden states, weight, bias and adapter, from d logits [..., V]."""
        if self.edge is None:
            self.logits()
        wanted = [leaf for leaf, need in zip(self.leaves, needs, strict=True) if need]
        options = {"retain_graph": True, "allow_unused": True}
        found = iter(torch.autograd.grad(self.edge, wanted, grad, **options))  # type: ignore[arg-type]
        return [next(found) if need else None for need in needs]


class Cell:
    """Shared by a tensor and its aliases, as memory would be."""

    def __init__(self, promise: Promise | None, values: Tensor | None = None) -> None:
        self.promise, self.values = promise, values
        self.graph = None if promise is None else Graph(promise)
        self.version = 0 if values is None else values._version
        self.changed_here = False

    def full(self, name: str) -> Tensor:
        """The logits; `name` is what cannot do without them."""
        if self.values is None:
            assert self.graph is not None
            tell(name)
            self.values = self.graph.logits()
            self.version = self.values._version
        return self.values

    @property
    def changed(self) -> bool:
        """Are the values no longer what was promised?"""
        return self.changed_here or self.changed_elsewhere

    @property
    def changed_elsewhere(self) -> bool:
        """Through a view of the values, which autograd knows and this tensor does not."""
        return self.values is not None and self.values._version != self.version

    def change(self) -> None:
        """The tensor itself was changed in place."""
        self.changed_here = True
        if self.values is not None:
            self.version = self.values._version
        if self.promise is not None:
            self.promise.base.family.changed.append(self.promise)

    def expect_current(self) -> None:
        """Raises where a change in place of other logits in the same memory would show here."""
        if self.promise is None or self.changed:
            return
        for other in self.promise.base.family.changed:
            if other.same_logits(self.promise):
                raise RuntimeError(
                    "logits: expected no change in place through another view of them, got one; "
                    "fastpo keeps views apart: read the changed one, or change a copy"
                )

    def __del__(self) -> None:
        if self.promise is not None and self.changed_elsewhere:
            self.promise.base.family.changed.append(self.promise)


def _uncounted() -> Any:
    """What this graph saves is its own: a checkpoint around the reader must not count it."""
    if saving_hooks() is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def tell(name: str) -> None:
    if name not in told:
        told.add(name)
        _log.warning("fastpo: %s is computed on full logits, which takes their memory", name)
