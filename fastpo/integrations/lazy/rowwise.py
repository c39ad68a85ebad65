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
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .base import Family, same_storage
from .promise import Promise


@dataclass(frozen=True)
class Slot:
    """In the place of an argument: which of `Rowwise.parents`, or of `numbers`."""

    index: int
    number: bool = False


@dataclass(frozen=True, eq=False)
class Root:
    """`op` of whole rows: of other lazy tensors [*shape, V] and of numbers [*shape, 1]."""

    op: Any  # of torch
    func: Callable[..., Any]  # the same, as it runs
    args: Any
    kwargs: Any
    parents: tuple[Any, ...]  # LazyLogits, which may change
    kept: tuple[Tensor, ...]  # the same as they were in autograd's graph
    nodes: tuple[Node, ...]  # what they stand for
    numbers: tuple[Tensor, ...]
    family: Family = field(default_factory=Family)

    def of(self, parents: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
        def put(slot: Slot) -> Tensor:
            return (numbers if slot.number else parents)[slot.index]

        args, kwargs = tree_map_only(Slot, put, (self.args, self.kwargs))
        made: Tensor = self.func(*args, **kwargs)
        return made


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
