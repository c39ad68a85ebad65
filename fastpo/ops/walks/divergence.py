"""The walks of `linear_divergence`: two heads over the same words, one tile of each at a time.

D = Σ_v f(log p_v, log q_v) of student p and teacher q. With g_v = ∂f/∂log p_v and G = Σ_v g_v,

    dD/dz_v = g_v - p_v·G

and the same for the teacher. The first walk finds both softmaxes, and with them a KL divergence;
the other kinds walk again to sum f and g. The products of the first tokens, as many as the budget
holds, are kept: their second walk and their backward multiply nothing twice. In products: 2 in the
forward, 2 more for each further walk over tokens that are not kept, 1 each for d hidden and
d weight. What is kept is float32 whatever the inputs are, because p - q cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import planner
from ..products import mm_
from ..rows import backend as R
from ..rows import registry
from ..rows.pair import backend as P
from .checks import check_memory
from .head import Head, HeadSpec, tile_in
from .mixture import Gradients, Operands, Sums

_PAIR_BYTES = 8  # of a word's two kept products


@dataclass(frozen=True)
class DivergenceSpec:
    """All that is not a tensor in one call.

    head: what both have in common.  maps, dtypes: of the products of each.
    budget: bytes of products that may be kept for the backward; None: the planner's own.
    """

    head: HeadSpec
    maps: tuple[R.LogitMap, R.LogitMap]
    dtypes: tuple[torch.dtype, torch.dtype]
    rule: P.Rule
    outputs: tuple[str, ...]
    budget: int | None

    @property
    def heads(self) -> list[HeadSpec]:
        pairs = zip(self.maps, self.dtypes, strict=True)
        return [replace(self.head, logit_map=own, compute_dtype=dtype) for own, dtype in pairs]


class Saved(NamedTuple):
    """divergence, entropy: [N] float32.  constants [4, N], totals [2, N]: see rows/pair/backend.py.

    kept: [2, kept tokens·V] float32 products, for each tile a contiguous block. Sizes are as if all
    rows were scored, so that they are known without the labels; the scored ones come first.
    """

    divergence: Tensor
    entropy: Tensor
    constants: Tensor
    totals: Tensor
    kept: Tensor


class _Heads:
    """Both heads; their rows are compacted alike, because they share the labels."""

    def __init__(self, operands: Sequence[Operands], labels: Tensor, spec: DivergenceSpec) -> None:
        self.heads = [
            Head(x.hidden, x.weight, x.bias, labels, one)
            for x, one in zip(operands, spec.heads, strict=True)
        ]
        self.rule, self.first = spec.rule, self.heads[0]
        self.rows = registry.pair_kernels(spec.head.backend)
        self.kept_tokens = _kept_tokens(len(self.first.hidden), operands[0].weight, spec)

    def words(self, v0: int, v1: int) -> list[Tensor]:
        return [head.words(v0, v1) for head in self.heads]

    def merge(self, state: Tensor) -> None:
        """`state` of a block once all words of this process are folded."""
        shard = self.first.spec.shard
        if shard is not None:
            shard.merge_pair(state, self.first.plan.vocab, self.rule.over)

    def parts(self, a: int, b: int) -> Iterator[tuple[int, int, bool]]:
        """The kept and the other rows of [a, b)."""
        split = min(max(self.kept_tokens, a), b)
        if split > a:
            yield a, split, True
        if split < b:
            yield split, b, False

    def kept(self, kept: Tensor, i: int, v0: int, v1: int, a: int, b: int) -> Tensor:
        start = planner.kept_cells(v0, self.first.plan.tiles.vocab) * self.kept_tokens
        return tile_in(kept[i, start:], self.kept_tokens, v1 - v0)[a:b]

    def sides(self, tiles: Sequence[Tensor], a: int, b: int) -> P.Sides:
        """Of rows a to b."""
        student, teacher = (
            P.Side(tile, head.bias, head.logit_map.rows(a, b))
            for tile, head in zip(tiles, self.heads, strict=True)
        )
        return student, teacher

    def products(self, words: Sequence[Tensor], a: int, b: int) -> list[Tensor]:
        """Computed again, in the heads' own buffers."""
        pairs = zip(self.heads, words, strict=True)
        return [head.products(head.block(a, b), own) for head, own in pairs]

    def fill(self, words: Sequence[Tensor], kept: Tensor, v0: int, a: int, b: int) -> list[Tensor]:
        """Computed for the first time, where they stay."""
        v1 = v0 + len(words[0])
        tiles = [self.kept(kept, i, v0, v1, a, b) for i in range(2)]
        for head, own, tile in zip(self.heads, words, tiles, strict=True):
            mm_(tile, head.block(a, b), own.t())
        return tiles


def _kept_tokens(tokens: int, weight: Tensor, spec: DivergenceSpec) -> int:
    (vocab, hidden), budget = weight.shape, spec.budget
    if budget is None:
        budget = planner.default_budget(vocab, hidden, weight.device)
    return min(tokens, budget // max(_PAIR_BYTES * _row_words(weight), 1))


def _row_words(weight: Tensor) -> int:
    """Cells of a row that is kept."""
    vocab = weight.shape[0]
    return planner.kept_cells(vocab, planner.tile_shape(1, vocab, weight.device.type).vocab)


def _sizes(
    labels: Tensor, weight: Tensor, spec: DivergenceSpec
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Of constants, totals and kept."""
    tokens = labels.shape[0]
    kept = _kept_tokens(tokens, weight, spec) * _row_words(weight)
    return (4, tokens), (2, tokens), (2, kept)


def fake_forward(operands: Sequence[Operands], labels: Tensor, spec: DivergenceSpec) -> Saved:
    """The shapes of `forward`, for tracing."""
    rows = (labels.shape, labels.shape, *_sizes(labels, operands[0].weight, spec))
    return Saved(*(labels.new_empty(shape, dtype=torch.float32) for shape in rows))


def forward(operands: Sequence[Operands], labels: Tensor, spec: DivergenceSpec) -> Saved:
    device = operands[0].hidden.device
    check_memory(hidden=operands[0].hidden)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        heads = _Heads(operands, labels, spec)
        first = heads.first
        n = len(first.hidden)
        state = R.filled_rows(P.INITIAL_STATE, n, device)
        sums = torch.zeros(P.SUMS, n, dtype=torch.float64, device=device)
        kept = first.empty(*_sizes(labels, operands[0].weight, spec)[2], dtype=torch.float32)
        entropy = "entropy" in spec.outputs
        for a, b in first.token_blocks():
            _softmaxes(heads, state, kept, entropy, a, b)
            heads.merge(state[:, a:b])
            if spec.rule.over is None:
                _values(heads, _constants(state), kept, sums, a, b)
        if spec.rule.over is None:
            first.sum_over_shards(sums)
        return _finish(first, spec, state, sums, kept, len(labels))


def _softmaxes(heads: _Heads, state: Tensor, kept: Tensor, entropy: bool, a: int, b: int) -> None:
    for _, v0, v1 in heads.first.vocab_tiles():
        words = heads.words(v0, v1)
        for c, d, keep in heads.parts(a, b):
            found = heads.fill(words, kept, v0, c, d) if keep else heads.products(words, c, d)
            sides = heads.sides(found, c, d)
            heads.rows.softmaxes(sides, v0, state[:, c:d], heads.rule.over, entropy)


def _values(heads: _Heads, constants: Tensor, kept: Tensor, sums: Tensor, a: int, b: int) -> None:
    for c, d, keep in heads.parts(a, b):
        for _, v0, v1 in heads.first.vocab_tiles():
            if keep:
                tiles = [heads.kept(kept, i, v0, v1, c, d) for i in range(2)]
            else:
                tiles = heads.products(heads.words(v0, v1), c, d)
            sides = heads.sides(tiles, c, d)
            heads.rows.values(sides, v0, constants[:, c:d], heads.rule, sums[:, c:d])


def _constants(state: Tensor) -> Tensor:
    return torch.stack([x for i in (0, 2) for x in (state[P.MAX + i], state[P.MASS + i].log())])


def _finish(
    head: Head, spec: DivergenceSpec, state: Tensor, sums: Tensor, kept: Tensor, tokens: int
) -> Saved:
    constants, over = _constants(state), spec.rule.over
    log_mass = constants[P.LOG_MASS :: 2]
    if over is None:
        divergence, ended = spec.rule.value(sums[0])
        totals = sums[1:].float()
        if ended is not None:  # infinite: a mark that the backward turns into no gradient
            totals = totals.masked_fill(ended, float("inf"))
    else:
        mean = state[P.CROSS] / state[P.MASS + 2 * over]
        divergence = mean - log_mass[over] + log_mass[1 - over]
        # The head that is averaged over, then the other one.
        totals = torch.stack((divergence + 1, torch.full_like(divergence, -1)))
        totals = totals.roll(over, 0)
    entropy = log_mass[0] - state[P.MOMENT] / state[P.MASS]
    # Neither is negative; what is, is rounding. NaN stays.
    found = [x.clamp_min(0).float() for x in (divergence, entropy)]
    divergence, entropy = (_all(head, x, tokens) for x in found)
    left_out = tokens - constants.shape[1]
    constants, totals = (F.pad(x, (0, left_out)) for x in (constants, totals))
    return Saved(divergence, entropy, constants, totals, kept)


def _all(head: Head, x: Tensor, tokens: int) -> Tensor:
    """Back to all N rows, 0 where not scored."""
    if head.ignored is not None:
        return x.masked_fill(head.ignored, 0)
    return head.spread(x, tokens)


def backward(
    grad: Tensor,  # [N]
    operands: Sequence[Operands],
    labels: Tensor,
    constants: Tensor,
    totals: Tensor,
    kept: Tensor,
    spec: DivergenceSpec,
    needs: Sequence[tuple[bool, bool, bool]],  # per head: d hidden, d weight, d bias
) -> list[Gradients]:
    with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
        heads = _Heads(operands, labels, spec)
        first = heads.first
        grad = first.compact(grad)
        constants, totals = (x[:, : len(grad)] for x in (constants, totals))
        silent = totals.isinf().any(0)
        silent = silent if first.ignored is None else silent | first.ignored
        factors = torch.cat((totals, grad.masked_fill(silent, 0).unsqueeze(0)))
        sums = [Sums(head, need) for head, need in zip(heads.heads, needs, strict=True)]
        outs = [first.empty(first.tile_cells * one.wanted, dtype=one.head.gemm) for one in sums]
        walk = _Backward(heads, constants, factors, kept, sums, outs)
        for _, v0, v1 in first.vocab_tiles():
            walk.tile(v0, v1)
        return [one.finish(len(labels)) for one in sums]


@dataclass(frozen=True)
class _Backward:
    heads: _Heads
    constants: Tensor
    factors: Tensor
    kept: Tensor
    sums: list[Sums]
    outs: list[Tensor]  # a tile for each head that is trained

    def tile(self, v0: int, v1: int) -> None:
        heads, words = self.heads, self.heads.words(v0, v1)
        for one in self.sums:
            one.open(v0, v1)
        for a, b in heads.first.token_blocks():
            shape = (b - a, v1 - v0)
            dx = [
                tile_in(x, *shape) if one.wanted else None
                for x, one in zip(self.outs, self.sums, strict=True)
            ]
            self._turn(words, dx, v0, v1, a, b)
            for one, own, x in zip(self.sums, words, dx, strict=True):
                if x is not None:
                    one.add(x, own, v0, a, b)
        for one in self.sums:
            one.close(v0, v1)

    def _turn(
        self, words: list[Tensor], dx: list[Tensor | None], v0: int, v1: int, a: int, b: int
    ) -> None:
        """d loss / d products of both heads for one tile."""
        heads = self.heads
        for c, d, keep in heads.parts(a, b):
            if keep:
                tiles = [heads.kept(self.kept, i, v0, v1, c, d) for i in range(2)]
            else:
                tiles = heads.products(words, c, d)
            student, teacher = (None if x is None else x[c - a : d - a] for x in dx)
            part = slice(c, d)
            heads.rows.gradients(
                heads.sides(tiles, c, d),
                v0,
                self.constants[:, part],
                self.factors[:, part],
                heads.rule,
                (student, teacher),
            )
