"""The walks of `linear_topk`: those of `linear_logps`, with the best words picked from each tile.

The row kernels need a label; every row gets word 0, whose own statistics nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import planner
from ..rows import backend as R
from .backward import BackwardWalk, row_grads
from .best_words import NEVER, merge, unpack, without
from .checks import check_memory
from .forward import fake_forward as fake_stats
from .forward import finish, folded_tiles
from .head import Forward, Head, HeadSpec
from .logits import to_logits


@dataclass(frozen=True)
class TopKSpec:
    """All that is not a tensor in one call."""

    k: int
    head: HeadSpec

    @property
    def first(self) -> int:
        """The word of the weight's first row."""
        return 0 if self.head.shard is None else self.head.shard.first


class Found(NamedTuple):
    """z and ids: [N, k], 0 in rows that are not scored.  top: [N], the largest z of all words.
    stats: of word 0; lse is what counts."""

    z: Tensor
    ids: Tensor
    top: Tensor
    stats: Forward

    @property
    def values(self) -> Tensor:  # [N, k]
        # The maximum and the log-sum beside it apart: their sum rounds at the size of the logits.
        # Not the row kernels' maximum: the last bit of their tanh may be another than that of z.
        return (self.z - self.top.unsqueeze(1)) - self.stats.log_mass.unsqueeze(1)


def fake_forward(hidden: Tensor, weight: Tensor, spec: TopKSpec) -> Found:
    """The shapes of `forward`, for tracing."""
    none = hidden.new_empty(0, dtype=torch.float32)
    stats = fake_stats(hidden, weight, spec.head)._replace(direction=none)
    z, ids = (
        hidden.new_empty(hidden.shape[0], spec.k, dtype=dtype)
        for dtype in (torch.float32, torch.int64)
    )
    return Found(z, ids, torch.empty_like(stats.maximum), stats)


def forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] 0, or ignore_index where the row is left out
    exclude: Tensor | None,  # [N]
    spec: TopKSpec,
) -> Found:
    check_memory(hidden=hidden)
    _check_excluded(exclude, spec.head.vocab(weight))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, labels, spec.head)
        n = len(head.hidden)
        state = R.filled_rows(R.INITIAL_STATE, n, head.device)
        kept, anchors = head.room(hidden)
        # One more for the word that is left out, which may be the largest.
        listed = spec.k + (exclude is not None)
        best = torch.full((n, listed), NEVER, dtype=torch.int64, device=head.device)
        for a, b in head.token_blocks():
            for v0, tile in folded_tiles(head, state, kept, anchors, a, b):
                z = to_logits(tile, v0, head.bias, head.spec.logit_map)
                best[a:b] = merge(best[a:b], z, spec.first + v0)
            if spec.head.shard is not None:
                best[a:b] = spec.head.shard.best(best[a:b])
            head.merge(state[:, a:b])
        z, ids = (_spread(head, x, len(hidden)) for x in unpack(best))
        top = z[:, 0].clone()
        if exclude is not None:
            z, ids = without(z, ids, exclude)
        stats = finish(head, state, len(hidden))._replace(kept=kept, anchors=anchors)
        return Found(z, ids, top, stats)


def _check_excluded(exclude: Tensor | None, vocab: int) -> None:
    if exclude is not None and exclude.device.type == "cpu" and bool((exclude >= vocab).any()):
        raise ValueError(f"exclude: expected values below {vocab}, got {int(exclude.max())}")


def _spread(head: Head, value: Tensor, tokens: int) -> Tensor:
    """[n, k] back to all N rows, 0 in those left out."""
    if head.ignored is not None:
        return value.masked_fill(head.ignored.unsqueeze(1), 0)
    return head.spread(value, tokens)


def backward(
    grads: tuple[Tensor | None, Tensor | None],  # of values [N, k] and of lse [N]
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    found: Found,
    spec: TopKSpec,
    needs: tuple[bool, bool, bool],  # d hidden, d weight, d bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, bias, labels, spec.head)
        g, g_lse = grads
        g = torch.zeros_like(found.z) if g is None else g
        # d value_j / d z_v = 1[v = word j] - p_v: dense is the sum of all, sparse the words' own.
        dense = -g.sum(1) if g_lse is None else g_lse - g.sum(1)
        rows = row_grads(head, {"logps": None, "entropy": None, "lse": dense}, found.stats)
        ids, own = found.ids - spec.first, _own_words(g, dense, found, spec.head.logit_map)
        if head.ignored is not None:
            own = own.masked_fill(head.ignored.unsqueeze(1), 0)
        elif head.rows is not None:
            ids, own = ids.index_select(0, head.rows), own.index_select(0, head.rows)
        return _TopKBackward(head, rows, found.stats, ids, own, needs).run(len(hidden))


def _own_words(g: Tensor, dense: Tensor, found: Found, logit_map: R.LogitMap) -> Tensor:
    """[N, k] d loss / d products of the listed words, written without cancellation at p near 1."""
    log_p = found.values
    dz = log_p.exp() * (dense.unsqueeze(1) + g) - g * torch.expm1(log_p)
    return dz * logit_map.cap_slope(found.z) * logit_map.factor


class _TopKBackward(BackwardWalk):
    """The walk of `linear_logps`; the cells of the listed words are overwritten in each tile."""

    def __init__(
        self,
        head: Head,
        grads: Tensor,
        saved: Forward,
        ids: Tensor,  # [n, k] rows of the weight, or of none
        own: Tensor,  # [n, k]
        needs: tuple[bool, bool, bool],
    ) -> None:
        super().__init__(head, grads, saved, False, needs)
        self.ids, self.own = ids, own
        # One cell more: words of other tiles and shards go there, since picking those of this tile
        # out would wait for the device.
        self._dx = head.empty(head.tile_cells + 1, dtype=head.gemm)

    def _dproducts(self, i: int, v0: int, v1: int, a: int, b: int, words: Tensor) -> Tensor:
        dx = super()._dproducts(i, v0, v1, a, b, words)
        ids = self.ids[a:b]
        rows = torch.arange(b - a, dtype=torch.int64, device=ids.device)
        start = rows.unsqueeze(1) * planner.row_cells(v1 - v0) - v0
        inside = (ids >= v0) & (ids < v1)
        cells = torch.where(inside, start + ids, self.head.tile_cells)
        self._dx.scatter_(0, cells.flatten(), self.own[a:b].to(self._dx.dtype).flatten())
        return dx
