"""One promise's logits: computed when something needs all of them, and kept from then on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops.walks.saving import retained, saving_hooks
from .base import Watch
from .blocks import fits_one_block, reduced
from .rowwise import Node, Rowwise

_log = logging.getLogger(__name__)
told: set[tuple[str, str]] = set()  # operation and place


class Graph:
    """From the operands of a head to its logits, and back; holds no logits itself.

    promise: None after the backward of its node, when PyTorch frees what nodes have saved. Whoever
    keeps a loss keeps its nodes, and with the operands may keep logits that these are made of.
    """

    def __init__(self, promise: Node) -> None:
        self.promise: Node | None = promise
        self.leaves: tuple[Tensor | None, ...] = ()
        self.edge: Any = None

    def logits(self, name: str) -> Tensor:
        """The values [..., V], without a graph of their own."""
        with torch.inference_mode(False), torch.enable_grad(), _uncounted():
            made = self._whole(name)
        if made.requires_grad:
            self.edge = torch.autograd.graph.get_gradient_edge(made)
        return made.detach()

    def _whole(self, name: str) -> Tensor:
        node = self.promise
        assert node is not None
        if node.dtype == torch.bool and isinstance(node, Rowwise) and not node.rearranged:
            # Of blocks, as are the numbers that words were compared with, to the last bit.
            made: Tensor = reduced(node, [], lambda x, _: x)
            return made
        self.leaves = node.leaves(name)
        return node.whole(self.leaves)

    def gradients(
        self, ctx: Any, grad: Tensor | None, needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Of hidden states, weight, bias and adapter, from d logits [..., V]; ctx: of the node."""
        if grad is None:
            return self.freed([None] * len(needs))
        ctx.saved_tensors  # noqa: B018 of none: PyTorch's error where it has freed them
        if self.edge is None:
            self.logits("its gradient")
        wanted = [leaf for leaf, need in zip(self.leaves, needs, strict=True) if need]
        options = {"retain_graph": retained(), "allow_unused": True}
        found = iter(torch.autograd.grad(self.edge, wanted, grad, **options))  # type: ignore[arg-type]
        return self.freed([next(found) if need else None for need in needs])

    def freed(self, found: Any) -> Any:
        """What its node has found in a backward, which may have been the last one."""
        if not retained():
            self.promise, self.leaves, self.edge = None, (), None
        return found


class Cell:
    """Shared by a tensor and its aliases, as memory would be."""

    def __init__(self, promise: Node | None, values: Tensor | None = None) -> None:
        self.promise, self.values = promise, values
        self.graph = None if promise is None else Graph(promise)
        self.open = False  # are the values where changes cannot be seen?
        self.watch = self.first = _watched(promise)
        self.heir: Watch | None = None
        if values is not None:
            self.watch.counter, self.watch.version = values, values._version

    def full(self, name: str) -> Tensor:
        """The logits; `name` is what cannot do without them."""
        if self.values is None:
            assert self.graph is not None and self.promise is not None
            self.tell(name)
            live = self.graph.promise is not None
            self.values = (self.graph if live else Graph(self.promise)).logits(name)
            self.watch.see(self.values)
            self.promise.family.add(self.watch)
        return self.values

    @property
    def layout(self) -> Tensor:
        """A tensor without values that lies in memory as the model's own would."""
        assert self.promise is not None
        shape, rows = self.promise.shape, self.promise.memory.rows
        strides, first = self.promise.strides, rows.storage_offset() * self.promise.pitch
        room = first + sum(n * step for n, step in zip(shape, strides, strict=True)) + 1
        return torch.empty(room, dtype=torch.uint8, device="meta").as_strided(shape, strides, first)

    def scale(self, scaled: Node) -> Graph:
        """In place, before anything was computed: other views of these logits do not know."""
        self.change()
        self.promise, self.graph, self.watch = scaled, Graph(scaled), _watched(scaled)
        return self.graph

    def tell(self, name: str) -> None:
        """That it needs the logits, if they are more than a block."""
        if self.promise is not None and not fits_one_block(self.promise):
            _tell(name)

    def promised(self, name: str, node: Node) -> Tensor:
        """The values of what this stood for, before any change in place."""
        scaled = self.promise is not None and self.promise.family is not node.family
        return Graph(node).logits(name) if scaled or self.changed else self.full(name)

    @property
    def changed(self) -> bool:
        """Are the values no longer what was promised?"""
        return self.open or self.watch.changed

    def change(self, counted: bool = False) -> None:
        """The tensor itself was changed in place; counted: so that autograd knows."""
        self.watch.here = True
        if self.values is not None:
            if not counted:
                # Below autograd no version tells those who share the values, or saved them.
                torch.autograd.graph.increment_version(self.values)
            self.watch.version = self.values._version
        if self.promise is not None:
            self.promise.family.add(self.watch)

    def expect_current(self) -> None:
        """Raises where a change in place of other logits in the same memory would show here."""
        if self.promise is not None:
            self.promise.family.expect_unchanged(self.watch, self.heir)


def _watched(promise: Node | None) -> Watch:
    return Watch(None if promise is None else promise.memory.rows)


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
        return ctx.graph.freed((None if grad is None else grad * ctx.factor, None, None))


class Rewritten(torch.autograd.Function):
    """The same by a tensor, say: gradients go to what they are made of from now on."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, graph: Graph, *operands: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(logits)
        ctx.graph = graph
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.graph.gradients(ctx, grad, ctx.needs_input_grad[2:]))


class Changed(torch.autograd.Function):
    """The node of logits whose values were changed as another tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, values: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        return None, grad


class Values(torch.autograd.Function):
    """Lazy logits' values, as a tensor after their node."""

    @staticmethod
    def forward(ctx: Any, logits: Any, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        values: Tensor = logits._cell.full(name).detach()
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return grad, None


class Kept(torch.autograd.Function):
    """The node of an alias, which stays when the tensor itself changes in place."""

    @staticmethod
    def forward(ctx: Any, logits: Any) -> Any:
        ctx.set_materialize_grads(False)
        return type(logits)(logits._cell, logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


def parents(logits: Any) -> list[Any]:
    """The tensors that an expression reads."""
    node = logits._cell.promise
    return list(node.root.parents) if isinstance(node, Rowwise) else []


def made_of(logits: Any, found: Callable[[Any], bool]) -> bool:
    """Is it such a tensor, or made of one?"""
    return found(logits) or any(made_of(x, found) for x in parents(logits))


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
