"""One promise's logits: computed when something needs all of them, and kept from then on."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops.walks.saving import saving_hooks
from .blocks import fits_one_block
from .rowwise import Node

_log = logging.getLogger(__name__)
told: set[tuple[str, str]] = set()  # operation and place


class Graph:
    """From the operands of a head to its logits, and back; holds no logits itself."""

    def __init__(self, promise: Node) -> None:
        self.promise = promise
        self.leaves: tuple[Tensor | None, ...] = ()
        self.edge: Any = None

    def logits(self, name: str) -> Tensor:
        """The values [..., V], without a graph of their own."""
        with torch.inference_mode(False), torch.enable_grad(), _uncounted():
            self.leaves = self.promise.leaves(name)
            made = self.promise.whole(self.leaves)
        if made.requires_grad:
            self.edge = torch.autograd.graph.get_gradient_edge(made)
        return made.detach()

    def gradients(self, grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Of hidden states, weight, bias and adapter, from d logits [..., V]."""
        if self.edge is None:
            self.logits("its gradient")
        wanted = [leaf for leaf, need in zip(self.leaves, needs, strict=True) if need]
        options = {"retain_graph": True, "allow_unused": True}
        found = iter(torch.autograd.grad(self.edge, wanted, grad, **options))  # type: ignore[arg-type]
        return [next(found) if need else None for need in needs]


class Cell:
    """Shared by a tensor and its aliases, as memory would be."""

    def __init__(self, promise: Node | None, values: Tensor | None = None) -> None:
        self.promise, self.values = promise, values
        self.graph = None if promise is None else Graph(promise)
        self.version = 0 if values is None else values._version
        self.changed_here = False

    def full(self, name: str) -> Tensor:
        """The logits; `name` is what cannot do without them."""
        if self.values is None:
            assert self.graph is not None
            self.tell(name)
            self.values = self.graph.logits(name)
            self.version = self.values._version
        return self.values

    def scale(self, scaled: Node) -> Graph:
        """In place, before anything was computed: other views of these logits do not know."""
        assert self.promise is not None
        self.promise.family.changed.append(self.promise)
        self.promise, self.graph = scaled, Graph(scaled)
        return self.graph

    def tell(self, name: str) -> None:
        """That it needs the logits, if they are more than a block."""
        if self.promise is not None and not fits_one_block(self.promise):
            _tell(name)

    def promised(self, name: str) -> Tensor:
        """The values before any change in place."""
        if self.changed and self.promise is not None:
            return Graph(self.promise).logits(name)
        return self.full(name)

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
            self.promise.family.changed.append(self.promise)

    def expect_current(self) -> None:
        """Raises where a change in place of other logits in the same memory would show here."""
        if self.promise is None or self.changed:
            return
        for other in self.promise.family.changed:
            if other.memory.same_logits(self.promise.memory):
                raise RuntimeError(
                    "logits: expected no change in place through another view of them, got one; "
                    "fastpo keeps views apart: read the changed one, or change a copy"
                )

    def __del__(self) -> None:
        if self.promise is not None and self.changed_elsewhere:
            self.promise.family.changed.append(self.promise)


class Scaled(torch.autograd.Function):
    """The node of logits that were scaled in place, of which nothing is computed."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, graph: Graph, factor: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(logits)
        ctx.graph, ctx.factor = graph, factor
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        return None if grad is None else grad * ctx.factor, None, None


class ScaledByRows(torch.autograd.Function):
    """The same by a tensor: gradients go to what the scaled ones are made of."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, graph: Graph, *operands: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(logits)
        ctx.graph = graph
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        found = [None] * len(needs) if grad is None else ctx.graph.gradients(grad, needs)
        return (None, None, *found)


def _uncounted() -> Any:
    """What this graph saves is its own: a checkpoint around the reader must not count it."""
    if saving_hooks() is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _tell(name: str) -> None:
    """Once for each operation and caller."""
    place = _caller()
    if (name, place) not in told:
        told.add((name, place))
        _log.warning("fastpo: %s%s is computed on full logits", name, place)


def _caller() -> str:
    """Who does it; nobody where autograd's own thread asks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("fastpo", "torch"):
            return f" ({frame.f_code.co_filename}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
