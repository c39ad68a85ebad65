"""The backward: vocabulary outside, tokens inside.

So each slice of d weight is complete, and rounded once, when the walk leaves it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..rows import backend as R
from .head import Adapted, Forward, Head, HeadSpec, addmm_float32, place_of_dweight
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
            return (saved.direction * g.float().unsqueeze(1)).to(hidden.dtype), None, None
        overwrites = needs[1] and into is None and not frozen and spec.lends
        overwrites = overwrites and spec.plan(hidden, weight).shared_bytes > 0
        with (loan or Loan()).claim(overwrites) as (reads, overwrites):
            spec = replace(spec, lends=overwrites)
            if frozen or not reads:
                # Nothing is kept for these terms: recompute all logits.
                spec = replace(spec, budget=0)
            head = Head(hidden, weight, bias, labels, spec)
            rows = row_grads(head, grads, saved)
            entropy_grad = grads["entropy"] is not None
            walk = BackwardWalk(head, rows, saved, entropy_grad, needs, into)
            dhidden, dweight, dbias = walk.run(len(hidden))
        return dhidden, dweight if into is None else None, dbias


def row_grads(head: Head, grads: dict[str, Tensor | None], saved: Forward) -> Tensor:
    """The numbers per row that the row kernel needs, [GRADS, n]."""

    def compact(x: Tensor | None) -> Tensor:
        x = torch.zeros_like(saved.logps) if x is None else x.float()
        return x if head.rows is None else x.index_select(0, head.rows)

    logps, shift, log_mass = map(compact, (saved.logps, saved.maximum, saved.log_mass))
    g, g_entropy, g_lse = (compact(grads[name]) for name in ("logps", "entropy", "lse"))
    entropy = compact(saved.entropy if saved.entropy.numel() else None)
    logit_map = head.spec.logit_map
    target = compact(saved.target)
    # d loss / d z_v = p_v·(common - g_entropy·log p_v), and at the label + g
    common = g_lse - g - g_entropy * entropy
    at_label = -g * torch.expm1(logps) + logps.exp() * (g_lse - g_entropy * (logps + entropy))
    at_label = at_label * logit_map.cap_slope(target) * logit_map.factor
    rows = torch.stack((shift, log_mass, common, g_entropy, at_label))
    if head.ignored is not None:
        # exp(z - inf) = 0 and zero coefficients: nothing of the row is left.
        rows.masked_fill_(head.ignored, 0)
        rows[R.LOG_MASS].masked_fill_(head.ignored, float("inf"))
    return rows


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
        self.in_place = n <= head.plan.tiles.tokens and head.weight.dtype == head.gemm
        self._dx = head.empty(head.tile_cells, dtype=head.gemm)

    def run(self, tokens: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        head = self.head
        for i, v0, v1 in head.vocab_tiles():
            words, slab = head.words(v0, v1), self._slab(v0, v1)
            for a, b in head.token_blocks():
                dx = self._dproducts(i, v0, v1, a, b, words)
                if self.dhidden is not None:
                    addmm_float32(self.dhidden[a:b], dx, words)
                if slab is not None:
                    self._accumulate(slab, dx, head.block(a, b)[:, head.trained])
                if self.dbias is not None:
                    self.dbias[v0:v1] += dx.sum(0, dtype=torch.float32)
            if self.dweight is not None and slab is not None and not self.in_place:
                self._round(self.dweight[v0:v1], slab)
        if self.dweight is not None and not len(head.hidden) and not self.adds:
            self.dweight.zero_()
        return self._dhidden(tokens), self.dweight, self.dbias

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
        return target if self.in_place else torch.zeros_like(target, dtype=torch.float32)

    def _accumulate(self, slab: Tensor, dx: Tensor, x: Tensor) -> None:
        if not self.in_place:
            addmm_float32(slab, dx.t(), x)
        elif self.adds:
            slab.addmm_(dx.t(), x)
        else:
            torch.mm(dx.t(), x, out=slab)

    def _round(self, target: Tensor, slab: Tensor) -> None:
        if self.adds:
            target.copy_(slab.add_(target))
        else:
            target.copy_(slab)

    def _dproducts(self, i: int, v0: int, v1: int, a: int, b: int, words: Tensor) -> Tensor:
        """d loss / d products of one tile [b - a, v1 - v0]: kept rows first, then recomputed."""
        head, K = self.head, self.head.plan.kept_tokens
        dx = self._dx[: (b - a) * (v1 - v0)].view(b - a, v1 - v0)
        split = min(max(K, a), b)
        if split > a:
            stored = head.stored(self.saved.kept, v0, v1)[a:split]
            self._turn(stored, self.saved.anchors[i, a:split], v0, a, split, dx[: split - a])
        if split < b:
            tile = head.products(head.block(split, b), words)
            self._turn(tile, None, v0, split, b, dx[split - a :])
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
            head.spec.logit_map,
            self.entropy_grad,
            out,
        )

    def _dhidden(self, tokens: int) -> Tensor | None:
        if self.dhidden is None:
            return None
        dhidden = self.head.sum_over_shards(self.dhidden).to(self.head.hidden.dtype)
        if self.head.rows is None:
            return dhidden
        return dhidden.new_zeros(tokens, dhidden.shape[1]).index_copy_(0, self.head.rows, dhidden)
