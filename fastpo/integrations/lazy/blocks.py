"""A reduction of logits, or of what was made of them, over the words: some rows at a time.

Each block of rows takes the head's product, what was done to it, and the reduction; the backward
computes the block again. Two products more than a walk of `linear_logps` with what it kept, and as
much memory as a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...ops.products import mm_
from ...ops.tiles.tiled import dense
from ...ops.walks.saving import retained
from .base import Base
from .promise import Promise
from .rowwise import Node

# Of logits in float32 that are simply computed, and of the products of a block at most.
BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# What is done to a block takes as much, up to twenty times over, so it has a quarter of that; but
# not fewer rows than these, for whose products the weight would be read too often.
_SHARE = 4
_ROWS = {"cpu": 64, "cuda": 256}

Reduction = Callable[[Tensor, list[Tensor]], Any]  # of rows [n, V] and their numbers [n, ...]


def reduced(node: Node, numbers: list[Tensor], reduction: Reduction) -> Any:
    """`reduction` of all rows: its tensors [n, ...] as [*rows.shape, ...].

    numbers: tensors [*rows.shape, ...] that it reads, too.
    """
    shape = node.rows.shape
    # As they are now: the backward reads them again.
    given = [x.reshape((shape.numel(), *x.shape[len(shape) :])).clone() for x in numbers]
    plan = _Plan(node, reduction, given)
    found = _Blocks.apply(plan, *plan.operands())
    whole = [x.reshape((*shape, *x.shape[1:])) for x in found]
    return tree_unflatten(whole, plan.spec)


def reduced_loss(
    loss: Callable[..., Tensor],
    node: Node,  # [N, V]
    target: Tensor,  # [N]
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """`cross_entropy`, `nll_loss`, with class weights as they are now."""
    weight = None if weight is None else weight.clone()
    options.update(weight=weight, ignore_index=ignore_index, reduction="none")
    each: Tensor = reduced(node, [target], lambda x, given: loss(x, given[0], **options))
    if reduction != "mean":
        return each if reduction == "none" else each.sum()
    kept = target != ignore_index
    weights = kept if weight is None else weight[target.masked_fill(~kept, 0)] * kept
    return each.sum() / weights.sum()


def fits_one_block(node: Node, words: int | None = None) -> bool:
    """words: of each row, where they are not all."""
    count = node.shape.numel() if words is None else node.rows.numel() * words
    return count <= _cells(node)


def _kind(node: Node) -> str:
    return "cpu" if node.device.type == "cpu" else "cuda"


def _cells(node: Node) -> int:
    return BYTES[_kind(node)] // 4


def _rows(node: Node) -> int:
    most = _cells(node) // max(node.shape[-1], 1)
    return max(most // _SHARE, min(most, _ROWS[_kind(node)]), 1)


@dataclass(eq=False)
class _Plan:
    node: Node
    reduction: Reduction
    given: list[Tensor]  # [n, ...]
    bases: list[Base] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)  # of rows
    spec: Any = None  # how the reduction arranges its tensors

    def __post_init__(self) -> None:
        self.numbers = list(self.given)
        self._collect(self.node)

    def _collect(self, node: Node) -> None:
        if isinstance(node, Promise):
            if all(base is not node.base for base in self.bases):
                self.bases.append(node.base)
            return
        self.numbers += [x for x in node.root.numbers if all(x is not y for y in self.numbers)]
        for parent in node.root.nodes:
            self._collect(parent)

    def operands(self) -> list[Tensor | None]:
        return [*(x for base in self.bases for x in base.operands), *self.numbers]

    def weights(self) -> list[Tensor]:
        """As products read them; perhaps copies, so that a plan must not hold them."""
        return [_read(dense(x.weight.detach()), x.hidden) for x in self.bases]

    def blocks(self) -> Iterator[Tensor]:
        """Which rows of the node's; at least one block, perhaps of none."""
        rows = torch.arange(self.node.rows.numel(), dtype=torch.int64, device=self.node.device)
        yield from rows.split(_rows(self.node))


def _read(weight: Tensor, hidden: Tensor) -> Tensor:
    """On a CPU as it is: its float32 products are of that."""
    return weight if hidden.device.type == "cpu" else weight.to(hidden.dtype)


class _Block:
    """Rows `where` of a node, and of all it is made of; products and numbers are leaves."""

    def __init__(self, plan: _Plan, weights: list[Tensor], where: Tensor) -> None:
        self.plan, self.weights, self.where = plan, weights, where
        self.products: list[tuple[int, Tensor, Tensor]] = []  # which base, its rows, [n, V]
        self.numbers: list[tuple[Tensor, Tensor, Tensor]] = []  # whose, its rows, [n, ...]
        self.known: dict[Any, tuple[Any, Tensor]] = {}  # what a key names lives as long as it

    def run(self) -> tuple[list[Tensor], Any]:
        given = [self.number(x, self.where, x.shape[:1]) for x in self.plan.given]
        return tree_flatten(self.plan.reduction(self.values(self.plan.node, self.where), given))

    def values(self, node: Node, where: Tensor) -> Tensor:  # [n, V]
        if isinstance(node, Promise):
            return node.read(self.product(node, where))
        key = (id(node.root), id(node.rows), id(where))
        if key not in self.known:
            inner = where if node.fresh else node.rows.flatten().index_select(0, where)
            parents = [self.values(x, inner) for x in node.root.nodes]
            node.root.check()
            numbers = [self.number(x, inner, x.shape[:-1]) for x in node.root.numbers]
            self.known[key] = ((node, where, inner), node.root.of(parents, numbers))
        return self.known[key][1]

    def product(self, node: Promise, where: Tensor) -> Tensor:
        key = (id(node.base), id(node.dense), id(where), node.dtype)
        if key not in self.known:
            rows = node.dense.flatten().index_select(0, where).clamp(min=0)
            which = next(i for i, base in enumerate(self.plan.bases) if base is node.base)
            hidden, adapter = node.base.select(rows)
            with torch.no_grad():
                down = None if adapter is None else adapter[0]
                found = node.base.products(hidden, down, node.dtype, self.weights[which])
            self.products.append((which, rows, found.requires_grad_(node.requires_grad)))
            self.known[key] = ((node, where), found)
        return self.known[key][1]

    def number(self, x: Tensor, where: Tensor, rows: tuple[int, ...]) -> Tensor:
        found = _picked(x.detach(), where, rows).requires_grad_(x.requires_grad)
        self.numbers.append((x, where, found))
        return found


def _picked(x: Tensor, where: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Of [*rows, ...], which need not lie one after the other: a copy of all would be large."""
    if not x.is_contiguous() and len(where):
        return x[torch.unravel_index(where, rows)]
    return x.reshape((prod(rows), *x.shape[len(rows) :])).index_select(0, where)


class _Sums:
    """Gradients of a plan's operands, in float32 until they are all there."""

    def __init__(self, plan: _Plan, weights: list[Tensor], needs: tuple[bool, ...]) -> None:
        self.plan, self.weights, self.operands = plan, weights, plan.operands()
        self.needs = {id(x): need for x, need in zip(self.operands, needs, strict=True)}
        self.sums: dict[int, Tensor] = {}

    def add(self, block: _Block, found: list[Tensor], grads: list[Tensor]) -> None:
        pairs = [(x, grad) for x, grad in zip(found, grads, strict=True) if x.requires_grad]
        leaves = [x for *_, x in (*block.products, *block.numbers) if x.requires_grad]
        if not pairs:
            return
        outs, into = zip(*pairs, strict=True)
        given = torch.autograd.grad(outs, leaves, into, allow_unused=True)
        of = dict(zip(map(id, leaves), given, strict=True))
        for which, rows, x in block.products:
            if of.get(id(x)) is not None:
                self.head(which, rows, of[id(x)])
        for x, rows, leaf in block.numbers:
            if of.get(id(leaf)) is not None:
                self.rows(x, rows, of[id(leaf)])

    def head(self, which: int, rows: Tensor, grad: Tensor) -> None:
        """What d products [n, V] are of hidden states, weight, bias and adapter."""
        base, weight = self.plan.bases[which], self.weights[which]
        grad = grad.to(weight.dtype)
        if self.needs[id(base.hidden)]:
            whole = mm_(grad.new_empty(len(grad), weight.shape[1]), grad, weight)
            self.rows(base.hidden, rows, whole)
        if self.needs[id(base.weight)]:
            hidden = base.hidden.detach().index_select(0, rows)
            self.product(base.weight, grad.t(), hidden.to(grad.dtype))
        if base.bias is not None and self.needs[id(base.bias)]:
            self.plus(base.bias, grad.sum(0, dtype=torch.float32))
        if base.adapter is not None:
            down, up = base.adapter
            if self.needs[id(down)]:
                self.rows(down, rows, grad @ up.detach().to(grad.dtype))
            if self.needs[id(up)]:
                self.product(up, grad.t(), down.detach().index_select(0, rows).to(grad.dtype))

    def plus(self, x: Tensor, grad: Tensor) -> None:
        if id(x) in self.sums:
            self.sums[id(x)] += grad
        else:
            self.sums[id(x)] = grad.to(_sum_dtype(x))

    def product(self, x: Tensor, one: Tensor, other: Tensor) -> None:
        """`plus` of one @ other; in float32 there is no second tensor of that size."""
        total = self.sums.get(id(x))
        if total is None or total.dtype != one.dtype:
            self.plus(x, one @ other)
        else:
            total.addmm_(one, other)

    def rows(self, x: Tensor, rows: Tensor, grad: Tensor) -> None:
        total = self.sums.get(id(x))
        if total is None:
            total = torch.zeros_like(x, dtype=_sum_dtype(x))
            self.sums[id(x)] = total = total.reshape((-1, *grad.shape[1:]))
        total.index_add_(0, rows, grad.to(total.dtype))

    def totals(self) -> list[Tensor | None]:
        """For every operand; one that is there twice gets its gradient once."""
        found = ((x, self.sums.pop(id(x), None)) for x in self.operands)
        return [
            None if total is None or x is None else total.view(x.shape).to(x.dtype)
            for x, total in found
        ]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *operands: Tensor | None) -> tuple[Tensor, ...]:
        ctx.plan = plan
        parts, weights = [], plan.weights()
        for where in plan.blocks():
            found, plan.spec = _Block(plan, weights, where).run()
            parts.append(found)
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018 of none: PyTorch's error where it has freed them
        plan: _Plan = ctx.plan
        if not retained():  # whoever keeps a loss keeps its nodes
            ctx.plan = None
        weights = plan.weights()
        sums = _Sums(plan, weights, ctx.needs_input_grad[1:])
        for where in plan.blocks():
            block = _Block(plan, weights, where)
            with torch.enable_grad():
                found, _ = block.run()
            sums.add(block, found, [grad.index_select(0, where) for grad in grads])
        return (None, *sums.totals())
