"""Functions of logits, word by word: nothing is computed until they are reduced over the words.

    p = logits.softmax(-1)
    -(p * logits.log_softmax(-1)).sum(-1)

A reduction computes a few rows of logits at a time, what was done to them, and what is left of it;
its backward does so once more. Whatever else reads a `Rowwise` computes all of it, as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .base import Family, same_storage
from .calls import here
from .promise import Promise

NUMBERS = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Slot:
    """In the place of an argument: which of `Rowwise.parents`, or of `numbers`."""

    index: int
    number: bool = False
    single: bool = False  # one number for all rows, which decides no dtype


@dataclass(frozen=True, eq=False)
class Root:
    """`op` of whole rows: of other lazy tensors [*shape, V] and of numbers [*shape, 1 or V]."""

    op: Any  # of torch
    func: Callable[..., Any]  # the same, as it runs
    args: Any
    kwargs: Any
    parents: tuple[Any, ...]  # LazyLogits, which may change
    kept: tuple[Tensor, ...]  # the same as they were in autograd's graph
    nodes: tuple[Node, ...]  # what they stand for
    numbers: tuple[Tensor, ...]
    versions: tuple[int | None, ...]  # of the numbers
    family: Family = field(default_factory=Family)

    def check(self) -> None:
        """What has all words is no copy."""
        if versions(self.numbers) != self.versions:
            raise RuntimeError(
                f"{getattr(self.op, '__name__', self.op)}: expected its operands to stay as they "
                "are until its result and gradient are read, got a change of one in place"
            )

    def of(self, parents: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
        def put(slot: Slot) -> Tensor:
            x = (numbers if slot.number else parents)[slot.index]
            return x.flatten()[:1].sum() if slot.single else x  # of no rows, too

        args, kwargs = tree_map_only(Slot, put, (self.args, self.kwargs))
        made: Tensor = self.func(*args, **kwargs)
        return made


def versions(numbers: Sequence[Tensor]) -> tuple[int | None, ...]:
    return tuple(None if x.is_inference() else x._version for x in numbers)


@dataclass(frozen=True, eq=False)
class Rowwise:
    """[*rows.shape, V]; [stacked, *rows.shape, V]; turned: [B, V, T] of rows [B, T].

    `rows` are rows of the root's.
    """

    root: Root
    rows: Tensor
    words: int
    dtype: torch.dtype
    stacked: int = 0
    turned: bool = False
    fresh: bool = True  # are these all of the root's rows, as they came?
    copied: bool = False  # do these rows lie in memory of their own?
    constant: bool = False

    @property
    def shape(self) -> torch.Size:
        if self.turned:
            return torch.Size((self.rows.shape[0], self.words, *self.rows.shape[1:]))
        return torch.Size((self.stacked,) * bool(self.stacked) + (*self.rows.shape, self.words))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def family(self) -> Family:
        return self.root.family

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return () if self.constant else (*self.root.kept, *self.root.numbers)

    @property
    def requires_grad(self) -> bool:
        return self.dtype.is_floating_point and any(x.requires_grad for x in self.operands)

    @property
    def rearranged(self) -> bool:
        """Are these no rows of words?"""
        return self.stacked > 0 or self.turned

    @property
    def memory(self) -> Node:
        """Whose values these would share."""
        return self.root.nodes[0].memory if self.turned else self

    @property
    def pitch(self) -> int:
        return self.memory.pitch if self.turned else self.words

    @property
    def strides(self) -> tuple[int, ...]:
        """As in the memory of what these are views of."""
        rows = tuple(n * self.pitch for n in self.rows.stride())
        if self.turned:
            return rows[0], 1, *rows[1:]
        return (self.rows.numel() * self.words,) * bool(self.stacked) + (*rows, 1)

    def view(self, rows: Tensor) -> Rowwise:
        copied = self.copied or not same_storage(rows, self.rows)
        return replace(self, rows=rows, fresh=False, copied=copied)

    def detach(self) -> Rowwise:
        if not any(x.requires_grad for x in self.operands):
            return self  # one root is computed once in a block, however often it is read
        root = replace(
            self.root,
            nodes=tuple(x.detach() for x in self.root.nodes),
            numbers=tuple(x.detach() for x in self.root.numbers),
        )
        return replace(self, root=root, constant=True)

    def leaves(self, name: str) -> tuple[Tensor, ...]:
        """All that `whole` needs, without a graph of their own."""
        self.root.check()
        pairs = zip(self.root.parents, self.root.nodes, strict=True)
        values = [x.as_promised(name, node) for x, node in pairs]
        found = [x.detach() for x in (*values, *self.root.numbers)]
        for x, own in zip(found, self.operands, strict=not self.constant):
            x.requires_grad_(own.requires_grad)
        return tuple(found)

    def whole(self, leaves: tuple[Any, ...]) -> Tensor:
        """The values [*shape], from those of all operands."""
        count = len(self.root.parents)
        if self.fresh:
            return self.root.of(leaves[:count], leaves[count:])
        where = self.rows.flatten()
        found = [x.reshape(-1, x.shape[-1]).index_select(0, where) for x in leaves]
        made = self.root.of(found[:count], found[count:]).view(self.shape)
        # A change in place of a copy must not reach what the backward of `root.op` reads.
        return made.clone() if self.copied else made


Node = Promise | Rowwise


@dataclass(frozen=True, eq=False)
class Operand:
    """A lazy tensor among the arguments, and what it stands for."""

    tensor: Any
    node: Node


def recorded(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` of whole rows as a `Rowwise`; NotImplemented where only the logits will do."""
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Operand)]
    node = operands[0].node
    fits = all(x.node.shape == node.shape and x.node.device == node.device for x in operands)
    parents = list({id(x.tensor): x for x in operands}.values())
    numbers: list[Tensor] = []

    def put(x: Any) -> Any:
        if isinstance(x, Operand):
            return Slot(next(i for i, p in enumerate(parents) if p.tensor is x.tensor))
        if not isinstance(x, Tensor):
            return x
        if _constant(x, node):
            # As it is now, and for blocks, which have one dimension before the words.
            return x.clone().view(x.shape[-1:])
        numbers.append(_number(x if x.ndim else x.view(1), node))
        return Slot(len(numbers) - 1, number=True, single=not x.ndim)

    if not fits or not all(_allowed(x, node) for x in tree_leaves((args, kwargs))):
        return NotImplemented
    args, kwargs = tree_map(put, (args, kwargs))
    tensors, nodes = zip(*((x.tensor, x.node) for x in parents), strict=True)
    kept = tuple(x.kept() for x in tensors)
    run = here(func, node.device)
    return _typed(
        Root(func, run, args, kwargs, tensors, kept, nodes, tuple(numbers), versions(numbers))
    )


def _allowed(x: Any, node: Node) -> bool:
    """Does this argument belong to rows, or to all of them alike?"""
    if isinstance(x, (Operand, *NUMBERS)):
        return True
    if not isinstance(x, Tensor):
        return False
    if x.device != node.device and (x.ndim or x.requires_grad):
        return False
    return x.ndim == 0 or _constant(x, node) or _of_rows(x, node)


def _constant(x: Tensor, node: Node) -> bool:
    """[V], or [..., 1, V], as some models' `final_logits_bias` is."""
    words = x.shape[-1:] == node.shape[-1:] != (1,) and x.numel() == x.shape[-1]
    return not x.requires_grad and (x.ndim == 0 or (words and x.ndim <= node.ndim))


def _of_rows(x: Tensor, node: Node) -> bool:
    """Does [..., 1] or [..., V] spread over the rows?"""
    if not 0 < x.ndim <= node.ndim or x.shape[-1] not in (1, node.shape[-1]):
        return False
    if x.shape[-1] > 1 and (type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided):
        return False
    sizes = zip(x.shape[-2::-1], node.rows.shape[::-1], strict=False)
    return all(size in (1, own) for size, own in sizes)


def _number(x: Tensor, node: Node) -> Tensor:
    """As it is now: nobody changes a copy; what has all words must not change."""
    spread = x.expand(*node.rows.shape, x.shape[-1])
    return spread if x.shape[-1] > 1 and not x.is_inference() else spread.clone()


def _typed(root: Root) -> Any:
    """Tried on one row of two words, which tells dtype and shape."""
    node = root.nodes[0]
    one = [1] * (node.ndim - 1)
    parents = [torch.ones(*one, 2, dtype=x.dtype, device=x.device) for x in root.nodes]
    numbers = [
        torch.ones(*one, min(x.shape[-1], 2), dtype=x.dtype, device=x.device) for x in root.numbers
    ]
    args, kwargs = tree_map_only(
        Tensor, lambda x: x if x.ndim == 0 else x[:2], (root.args, root.kwargs)
    )
    try:
        with torch.no_grad():
            made = replace(root, args=args, kwargs=kwargs).of(parents, numbers)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return NotImplemented  # whatever is wrong, the logits will tell
    if not isinstance(made, Tensor) or made.shape != (*one, 2) or made.device != node.device:
        return NotImplemented
    rows = torch.arange(node.rows.numel(), dtype=torch.int64, device=node.device)
    return Rowwise(root, rows.view(node.rows.shape), node.shape[-1], made.dtype)
