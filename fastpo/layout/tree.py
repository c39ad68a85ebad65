"""The prefix tree of a batch, found by content.

Sorted by first column and tokens, neighbours share what begins alike. Of those that do the longest
comes first, then what branches off it, from its end on: a preorder of the tree, in which a row owns
what follows its longest common prefix with its predecessor. The queries of a row are the tokens it
owns and its keys the whole row. Shared prompts, groups of completions, edits that differ late, rows
that begin others and, where nothing is shared, plain packing without padding are all this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .gather import PLACES, Copies, Run

_NUMBERS = PLACES | {"dtype": torch.int32}


@dataclass(frozen=True)
class Row:
    """A distinct row: `shared` tokens of its predecessors, then `owned` of its own."""

    shared: int
    owned: int
    path: tuple[Run, ...]  # packed tokens to its own 0 .. length, in order

    @property
    def length(self) -> int:
        return self.shared + self.owned


class Sequences(NamedTuple):
    """The rows as kernels of variable length take them: where each begins and ends, the longest."""

    queries: Tensor  # [rows + 1] int32
    keys: Tensor  # [rows + 1] int32
    longest_queries: int
    longest_keys: int


class Tree(NamedTuple):
    """For each packed token; q sees k when segment[k] <= segment[q] < end[k], and what the rule of
    its layer says of their depths."""

    segment: Tensor  # [S] int32: the row that owns it
    end: Tensor  # [S] int32: the first row behind it that it is not in
    depth: Tensor  # [S] int32: its place in its row


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a padded batch [R, T] stand in a packed row [S], and back."""

    shape: tuple[int, int]
    real: tuple[int, ...]  # [R]: tokens of each row of the batch
    rows: tuple[Row, ...]  # in packed order
    tokens: Tensor  # [S] int64: cell of the padded batch, row by row, each packed token is from
    places: Copies  # packed [S] to padded [R·T]; pads get token 0

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def owned(self) -> list[int]:
        return [row.owned for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.rows]

    @cached_property
    def positions(self) -> Tensor:
        """[S] int64: the columns of the padded run."""
        return self.tokens % self.shape[1]

    @cached_property
    def keys(self) -> Copies:
        """Packed [S] to whole rows one after the other [Σ length]."""
        runs, end = [], 0
        for row in self.rows:
            runs += [Run(run.source, end + run.target, run.length) for run in row.path]
            end += row.length
        return Copies.of(runs, self.size, end, self.tokens.device)

    @cached_property
    def sequences(self) -> Sequences:
        both = (
            torch.tensor([0, *accumulate(numbers)], **_NUMBERS)
            for numbers in (self.owned, self.lengths)
        )
        queries, keys = (x.to(self.tokens.device, non_blocking=True) for x in both)
        return Sequences(queries, keys, max(self.owned), max(self.lengths))

    @cached_property
    def tree(self) -> Tree:
        end = torch.full((self.size,), len(self.rows), **_NUMBERS)
        for number, (before, row) in enumerate(pairwise(self.rows), 1):
            for run in before.path:
                kept = max(row.shared - run.target, 0)
                end[run.source + kept : run.source + run.length] = number
        numbers = torch.arange(len(self.rows), **_NUMBERS)
        segment = numbers.repeat_interleave(torch.tensor(self.owned, **PLACES))
        depth = torch.cat([torch.arange(r.shared, r.length, **_NUMBERS) for r in self.rows])
        return Tree(*(x.to(self.tokens.device, non_blocking=True) for x in (segment, end, depth)))

    @cached_property
    def columns(self) -> int:
        """How many of the padded run's columns hold tokens, counted from the first on."""
        width = self.shape[1]
        return max(min(run.target % width + run.length, width) for run in self.places.runs)

    def pack(self, x: Tensor) -> Tensor:  # [R, T] -> [1, S]
        return x.flatten().index_select(0, self.tokens).unsqueeze(0)

    def put_back(self, x: Tensor) -> Tensor:  # [1, S, ...] or [S, ...] -> [R, T, ...]
        flat = x.flatten(0, 1) if x.shape[0] == 1 and x.shape[1:2] == (self.size,) else x
        return self.places(flat, 0).unflatten(0, self.shape)


def layout_of(
    ids: Tensor,  # [R, T] int64
    mask: Tensor | None = None,  # [R, T], 0 at pads, which stand left or right of a row's tokens
    *,
    share: bool = True,
    least: int = 1,
) -> Layout:
    """The layout of a batch, on its device; ids and mask are read on the host, at once.

    share: False for packing alone. least: fewer common tokens are not shared. Raises ValueError for
    shapes, and for a mask with holes or an empty row.
    """
    device, (height, width) = ids.device, _shape(ids, mask)
    # Above 0, whatever the ids: some models have tokens below 0. Pads are 0, so that a row that
    # another begins with is sorted before it.
    cells = ids - ids.min() + 1
    cells = cells if mask is None else torch.where(mask.to(device) != 0, cells, 0)
    cells = cells.cpu()  # the one wait for a GPU
    first, length = _extent(cells != 0)
    if share:
        keys = torch.cat((first.unsqueeze(1), cells), 1)
        distinct, which = torch.unique(keys, dim=0, return_inverse=True)  # sorted
        firsts = torch.full((len(distinct),), height, **PLACES)
        chosen = firsts.scatter_reduce(0, which, torch.arange(height, **PLACES), "amin")
        lengths = length[chosen].tolist()
        order = _preorder(_common(distinct, least), lengths)
    else:
        chosen = which = torch.arange(height, **PLACES)
        lengths = length.tolist()
        order = [(row, 0) for row in range(height)]
    rows = _rows((shared, lengths[u]) for u, shared in order)
    starts = [int(chosen[u] * width + first[chosen[u]]) for u, _ in order]
    tokens = [
        torch.arange(row.owned, **PLACES) + (start + row.shared)
        for start, row in zip(starts, rows, strict=True)
    ]
    packed = torch.cat(tokens).to(device, non_blocking=True)
    paths = {u: row.path for (u, _), row in zip(order, rows, strict=True)}
    for u in reversed(range(len(lengths))):
        paths.setdefault(u, paths.get(u + 1, ()))  # what begins another begins the next
    runs = [
        Run(run.source, r * width + column + run.target, run.length)
        for r, (u, column) in enumerate(zip(which.tolist(), first.tolist(), strict=True))
        for run in _cut(paths[u], lengths[u])
    ]
    places = Copies.of(runs, len(packed), ids.numel(), device)
    return Layout((height, width), tuple(length.tolist()), rows, packed, places)


def _shape(ids: Tensor, mask: Tensor | None) -> tuple[int, int]:
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"ids: expected shape (R, T) with tokens, got {tuple(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"mask: expected shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
    return ids.shape[0], ids.shape[1]


def _extent(real: Tensor) -> tuple[Tensor, Tensor]:
    """First column and length of every row."""
    first, length = real.int().argmax(1), real.sum(1)
    columns = torch.arange(real.shape[1], **PLACES)
    inside = (columns >= first.unsqueeze(1)) & (columns < (first + length).unsqueeze(1))
    if not bool(torch.equal(inside, real)) or not bool(length.all()):
        raise ValueError("mask: expected one run of tokens in every row, got holes or an empty row")
    return first, length


def _common(distinct: Tensor, least: int) -> list[int]:
    """Tokens that each sorted row [first column, cells] shares with the one before."""
    first, cells = distinct[:, 0], distinct[:, 1:]
    # Of one that begins earlier it already differs there: less than none.
    shared = (cells[1:] != cells[:-1]).int().argmax(1) - first[1:]
    shared = torch.where(shared >= least, shared, 0)
    return [0, *shared.tolist()]


def _preorder(shared: list[int], lengths: list[int]) -> list[tuple[int, int]]:
    """Sorted rows in the order of their tree, and what each shares with the one before.

    A row that another begins with is not there: it owns nothing. The longest branch comes first:
    what leaves it needs a mask as large as it is long, the first does not.
    """
    found: list[tuple[int, int]] = []
    branches = [(0, 0, len(lengths))]  # tokens before it, its rows
    while branches:
        before, low, high = branches.pop()
        if high - low == 1:
            found += [(low, before)] if lengths[low] > before else []
            continue
        fork = min(shared[low + 1 : high])
        ends = [low, *(i for i in range(low + 1, high) if shared[i] == fork), high]
        *others, longest = sorted(pairwise(ends), key=lambda rows: max(lengths[slice(*rows)]))
        branches += [*((fork, *rows) for rows in others), (before, *longest)]
    return found


def _rows(order: Iterable[tuple[int, int]]) -> tuple[Row, ...]:
    """Of what each shares with the one before, and its length."""
    rows: list[Row] = []
    path: tuple[Run, ...] = ()
    end = 0
    for common, length in order:
        path = (*_cut(path, common), Run(end, common, length - common))
        rows.append(Row(common, length - common, path))
        end += length - common
    return tuple(rows)


def _cut(path: Iterable[Run], length: int) -> Iterator[Run]:
    for run in path:
        if run.target < length:
            yield Run(run.source, run.target, min(run.length, length - run.target))
