"""The backward: vocabulary outside, tokens inside.

So each slice of d weight is complete, and rounded once, when the walk leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ... import planner
from ..products import addmm_, mm_
from ..rows import backend as R
from .anchored import Operands, exponents_of, product, unit_columns
from .head import Adapted, Forward, Head, HeadSpec, place_of_dweight, tile_in
from .lending import Loan


def backward(
    grads: dict[str, Tensor | None],  # of logps, entropy and lse, each [N] or None
    hidden: Tensor,
    weight: Tensor | Adapted,
    bias: Tensor | None,
    labels: Tensor,
    saved: Forward,
    spec: HeadSpec,
    needs: tuple[bool, bool, bool],  # d hidden, d weight, d bias
    into: Tensor | None = None,  # [V, H], d weight is added here; then None is returned for it
    loan: Loan | None = None,  # of what was kept, where others may read it or have overwritten it
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        frozen = saved.direction.numel() > 0
        if frozen and grads["entropy"] is None and grads["lse"] is None:
            g = grads["logps"]
            g = torch.zeros_like(saved.logps) if g is None else g
            if spec.ignore_index is not None:  # a loss may give them NaN, and 0·NaN is NaN
                g = g.masked_fill(labels == spec.ignore_index, 0)
            return (saved.direction * g.unsqueeze(1)).to(hidden.dtype), None, None
        overwrites = spec.lends and spec.plan(hidden, weight).shared_bytes > 0
        with (loan or Loan()).claim(overwrites) as (reads, overwrites):
            spec = replace(spec, lends=overwrites)
            if not reads:
                spec = replace(spec, budget=0)  # recompute all logits
            head = Head(hidden, weight, bias, labels, spec)
            rows = row_grads(head, grads, saved)
            entropy_grad = grads["entropy"] is not None
            walk: BackwardWalk
            if head.anchored and not entropy_grad and grads["lse"] is None:
                walk = ExponentialsWalk(head, rows, saved, needs, into)
            else:
                walk = BackwardWalk(head, rows, saved, entropy_grad, needs, into)
            dhidden, dweight, dbias = walk.run(len(hidden))
        return dhidden, dweight if into is None else None, dbias


def row_grads(head: Head, grads: dict[str, Tensor | None], saved: Forward) -> Tensor:
    """The numbers per row that the row kernel needs, [GRADS, n]."""

    def compact(x: Tensor | None) -> Tensor | None:
        return None if x is None else head.compact(x).contiguous()

    logps, maximum, log_mass, target = map(
        head.compact, (saved.logps, saved.maximum, saved.log_mass, saved.target)
    )
    entropy = compact(saved.entropy) if grads["entropy"] is not None else None
    kept = R.Saved(logps, maximum, log_mass, target, entropy)
    upstream = R.Upstream(*(compact(grads[name]) for name in ("logps", "entropy", "lse")))
    return head.kernels.row_grads(kept, upstream, head.logit_map, head.ignored)


class BackwardWalk:
    """The walk that turns row gradients into d hidden, d weight and d bias."""

    def __init__(
        self,
        head: Head,
        grads: Tensor,
        saved: Forward,
        entropy_grad: bool,
        needs: tuple[bool, bool, bool],
        into: Tensor | None = None,
    ) -> None:
        self.head, self.grads, self.saved, self.entropy_grad = head, grads, saved, entropy_grad
        n, (V, H) = len(head.hidden), head.weight.shape
        trained = len(range(H)[head.trained])
        self.dhidden = head.zeros(n, H) if needs[0] else None
        self.adds = into is not None
        self.dweight = into
        if needs[1] and into is None:
            self.dweight = self._dweight(V, trained)
        self.dbias = head.zeros(V) if needs[2] else None
        self.in_place = len(self._blocks()) == 1 and head.weight.dtype == head.gemm
        self._dx = head.empty(self._cells(), dtype=head.gemm)
        self._sums: Tensor | None = None

    def run(self, tokens: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        head = self.head
        for i, v0, v1 in self._tiles():
            words, slab = head.words(v0, v1), self._slab(v0, v1)
            for a, b in self._blocks():
                dx = self._dproducts(i, v0, v1, a, b, words)
                if self.dhidden is not None:
                    addmm_(self.dhidden[a:b], dx, words)
                if slab is not None:
                    self._accumulate(slab, dx, self._rows(a, b))
                if self.dbias is not None:
                    self._add_bias(self.dbias[v0:v1], dx, a, b)
            if self.dweight is not None and slab is not None and not self.in_place:
                self._round(self.dweight[v0:v1], slab)
        return self._dhidden(tokens), self.dweight, self.dbias

    def _tiles(self) -> Iterable[tuple[int, int, int]]:
        return self.head.vocab_tiles()

    def _blocks(self) -> list[tuple[int, int]]:
        return list(self.head.token_blocks())

    def _cells(self) -> int:
        """Of the largest tile."""
        return self.head.tile_cells

    def _rows(self, a: int, b: int) -> Tensor:
        """What d products are multiplied with for d weight."""
        return self.head.block(a, b)[:, self.head.trained]

    def _add_bias(self, dbias: Tensor, dx: Tensor, a: int, b: int) -> None:
        dbias += dx.sum(0, dtype=torch.float32)

    def _dweight(self, vocab: int, trained: int) -> Tensor:
        head = self.head
        if head.spec.lends and isinstance(head.weight, Tensor):
            return place_of_dweight(self.saved.kept, head.weight)
        return head.empty(vocab, trained, dtype=head.weight.dtype)

    def _slab(self, v0: int, v1: int) -> Tensor | None:
        """Where d weight of these words is summed: in place when one product completes it."""
        if self.dweight is None:
            return None
        target = self.dweight[v0:v1]
        if self.in_place:
            return target
        self._sums = cleared(self._sums, target)
        return self._sums

    def _accumulate(self, slab: Tensor, dx: Tensor, x: Tensor) -> None:
        if self.adds or not self.in_place:
            addmm_(slab, dx.t(), x)
        else:
            mm_(slab, dx.t(), x)

    def _round(self, target: Tensor, slab: Tensor) -> None:
        if self.adds:
            target.copy_(slab.add_(target))
        else:
            target.copy_(slab)

    def _dproducts(self, i: int, v0: int, v1: int, a: int, b: int, words: Tensor) -> Tensor:
        """d loss / d products of one tile [b - a, v1 - v0]: kept rows first, then recomputed."""
        head, K = self.head, self.head.plan.kept_tokens
        dx = tile_in(self._dx, b - a, v1 - v0)
        split = min(max(K, a), b)
        if split > a:
            stored = head.stored(self.saved.kept, i, v0, v1)[a:split]
            if head.anchored:
                anchors = self.grads[R.SHIFT, a:split] + self.grads[R.LOG_MASS, a:split]
                anchors += self.saved.anchors[0, a:split].log()
            else:
                anchors = self.saved.anchors[i, a:split]
            self._turn(stored, anchors, v0, a, split, dx[: split - a])
        if split < b:
            tile = head.products(head.block(split, b), words)
            self._turn(tile, None, v0, split, b, dx[split - a :])
            if head.mask is not None:
                dx[split - a :].masked_fill_(~head.mask.allowed(split, b, v0, v1), 0.0)
        return dx

    def _turn(
        self, source: Tensor, anchors: Tensor | None, first: int, a: int, b: int, out: Tensor
    ) -> None:
        head = self.head
        head.kernels.backward(
            source,
            anchors,
            first,
            head.labels[a:b],
            head.bias,
            self.grads[:, a:b],
            head.logit_map.rows(a, b),
            self.entropy_grad,
            out,
        )

    def _dhidden(self, tokens: int) -> Tensor | None:
        if self.dhidden is None:
            return None
        dhidden = self.head.sum_over_shards(self.dhidden).to(self.head.hidden.dtype)
        return self.head.spread(dhidden, tokens)


def cleared(sums: Tensor | None, target: Tensor) -> Tensor:
    """Zeros for a tile of d weight in float32, in memory of the tile before: none is wider than
    that."""
    if sums is None:
        return torch.zeros_like(target, dtype=torch.float32)
    return sums[: len(target)].zero_()


class ExponentialsWalk(BackwardWalk):
    """The walk of log-probabilities' gradients alone, after the forward of anchored.py.

    d loss / d products is E times a number per row, with E as it was stored, so E goes into both
    products and the numbers multiply hidden states before and d hidden after them. Tokens that were
    not kept have p in its place, from the forward's product beside their log-sum-exp.
    """

    def __init__(
        self,
        head: Head,
        grads: Tensor,
        saved: Forward,
        needs: tuple[bool, bool, bool],
        into: Tensor | None,
    ) -> None:
        super().__init__(head, grads, saved, False, needs, into)
        K = head.plan.kept_tokens
        self.scale = grads[R.COMMON] * head.spec.logit_map.factor  # [n]
        self.scale[:K] *= saved.anchors[0, :K]
        if len(head.hidden) > K:
            self._again = self._beside_log_mass(K)
        if head.ignored is not None:
            self.scale.masked_fill_(head.ignored, 0)
        self._scale = self.scale.unsqueeze(1).to(head.gemm)
        self._hidden = (head.hidden * self.scale.unsqueeze(1)).to(head.gemm)

    def _beside_log_mass(self, K: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows from K on, what their exponents are relative to, what the label's cell is.

        Exponentials are probabilities, but for the rounding of what they are relative to.
        """
        head = self.head
        # From the mass itself: where all of it is one word's, exp of a rounded logarithm is not 1.
        share = self.saved.anchors[0, K : len(head.hidden)].double()
        shift = self.grads[R.SHIFT, K:].double()
        lse = shift * exponents_of(head.spec.logit_map.factor) - share.log2()
        if head.ignored is not None:
            lse.masked_fill_(head.ignored[K:], float("inf"))
        base = lse.float()
        unit = torch.exp2(base - lse).float()
        self.scale[K:] *= unit
        own = torch.expm1(head.compact(self.saved.logps)[K:]).div_(unit)  # -Σ over the others
        x = unit_columns(head.hidden[K:].to(head.gemm))
        return x, base, own.to(head.gemm)

    def _tiles(self) -> Iterable[tuple[int, int, int]]:
        return self.head.vocab_tiles(self._width())

    def _width(self) -> int:
        plan = self.head.plan
        again = len(self.head.hidden) - plan.kept_tokens
        return planner.recomputed_words(again, plan.block_words)

    def _blocks(self) -> list[tuple[int, int]]:
        """The kept tokens, and all others."""
        K, n = self.head.plan.kept_tokens, len(self.head.hidden)
        return [(a, b) for a, b in ((0, min(K, n)), (K, n)) if a < b]

    def _cells(self) -> int:
        return (len(self.head.hidden) - self.head.plan.kept_tokens) * self._width()

    def _rows(self, a: int, b: int) -> Tensor:
        return self._hidden[a:b]

    def _add_bias(self, dbias: Tensor, dx: Tensor, a: int, b: int) -> None:
        addmm_(dbias.unsqueeze(1), dx.t(), self._scale[a:b])

    def _dproducts(self, i: int, v0: int, v1: int, a: int, b: int, words: Tensor) -> Tensor:
        """E of one tile, which is d loss / d products but for a number per row."""
        if a < self.head.plan.kept_tokens:
            return self.head.stored(self.saved.kept, i, v0, v1)[a:b]
        return self._probabilities(v0, v1, a, b, words)

    def _probabilities(self, v0: int, v1: int, a: int, b: int, words: Tensor) -> Tensor:
        from ...kernels.anchored import Exponentials
        from ...kernels.anchored_label import anchored_label

        head, (x, base, own), width = self.head, self._again, self._width()
        bias = None if head.bias is None else head.bias[v0:v1]
        rows = Operands(x, unit_columns(words), None, bias, head.spec.logit_map.factor)
        product(head, rows, base, Exponentials(self._dx, b - a, width, 0, b - a), 0, sums=False)
        e = self._dx.view(b - a, width)[:, : v1 - v0]
        anchored_label(e, own, head.labels[a:b], v0)
        return e

    def _dhidden(self, tokens: int) -> Tensor | None:
        if self.dhidden is not None:
            self.dhidden.mul_(self.scale.unsqueeze(1))
        return super()._dhidden(tokens)
