"""The walks of `mixed_linear_logps`: a tile is Σ_i m_i·z_i, and the row kernels see one head.

Nothing is kept for the backward: every tile is computed again, head by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..products import addmm_, mm_
from ..rows import backend as R
from .backward import cleared, row_grads
from .forward import finish
from .head import Forward, Head, HeadSpec, check_labels, tile_in
from .logits import nan_where_infinite, to_logits


@dataclass(frozen=True)
class Operands:
    """The tensors of one head; gradients come back in the same form."""

    hidden: Tensor  # [N, H_i]
    weight: Tensor  # [V, H_i]
    bias: Tensor | None  # [V]


@dataclass(frozen=True)
class MixtureSpec:
    """All that is not a tensor in one call.

    head: of the mixture; its map is the temperature.  maps, dtypes: of the products of each head.
    """

    head: HeadSpec
    maps: tuple[R.LogitMap, ...]
    dtypes: tuple[torch.dtype, ...]


class Mixture:
    """Heads over the same tokens and words, their tiles weighed and added."""

    def __init__(
        self,
        operands: Sequence[Operands],
        coefficients: Tensor,  # [M] or [N, M] float32
        labels: Tensor,  # [N]
        spec: MixtureSpec,
    ) -> None:
        self.heads, self.maps = [], spec.maps
        for x, dtype, own in zip(operands, spec.dtypes, spec.maps, strict=True):
            hidden = nan_where_infinite(x.hidden, own)
            one = replace(spec.head, compute_dtype=dtype)
            self.heads.append(Head(hidden, x.weight, x.bias, labels, one))
        first = self.heads[0]
        for head in self.heads[1:]:
            head._tile = first._tile  # one head's products at a time
        self._mixed = first.empty(first.tile_cells, dtype=torch.float32)
        n = len(first.hidden)
        if coefficients.dim() == 1:
            self.coefficients = coefficients.expand(n, -1)
        elif first.rows is not None:
            self.coefficients = coefficients.index_select(0, first.rows)
        elif first.ignored is not None:
            self.coefficients = coefficients.masked_fill(first.ignored.unsqueeze(1), 0)
        else:
            self.coefficients = coefficients

    def words(self, v0: int, v1: int) -> list[Tensor]:
        return [head.words(v0, v1) for head in self.heads]

    def part(self, a: int, b: int, v: int) -> Tensor:  # [b - a, v]
        """The float32 buffer the heads share."""
        return tile_in(self.heads[0]._tile, b - a, v)

    def logits(self, i: int, words: Tensor, first: int, a: int, b: int) -> Tensor:
        """z_i of one tile [b - a, v], in the buffer the heads share."""
        head = self.heads[i]
        return to_logits(head.products(head.block(a, b), words), first, head.bias, self.maps[i])

    def tile(self, words: list[Tensor], first: int, a: int, b: int) -> Tensor:
        """Σ_i m_i·z_i of one tile [b - a, v]."""
        v = len(words[0])
        mixed = tile_in(self._mixed, b - a, v).zero_()
        for i in range(len(self.heads)):
            z = self.logits(i, words[i], first, a, b)
            mixed.addcmul_(z, self.coefficients[a:b, i : i + 1])
        return mixed


def forward(
    operands: Sequence[Operands], coefficients: Tensor, labels: Tensor, spec: MixtureSpec
) -> Forward:
    weight = operands[0].weight
    check_labels(labels, spec.head.vocab(weight), spec.head.ignore_index)
    _check_finite(coefficients, labels, spec.head.ignore_index)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        mixture = Mixture(operands, coefficients, labels, spec)
        head, stats = mixture.heads[0], spec.head.stats
        state = R.filled_rows(R.INITIAL_STATE, len(head.hidden), head.device)
        for a, b in head.token_blocks():
            own, block = head.labels[a:b], state[:, a:b]
            for _, v0, v1 in head.vocab_tiles():
                tile = mixture.tile(mixture.words(v0, v1), v0, a, b)
                head.kernels.forward(
                    tile, v0, own, None, block, spec.head.logit_map, stats, None, None, False
                )
            head.merge(block)
        return finish(head, state, len(labels))


def _check_finite(coefficients: Tensor, labels: Tensor, ignore_index: int | None) -> None:
    """On a CPU; elsewhere reading them would wait for the device."""
    if labels.device.type != "cpu":
        return
    wrong = ~coefficients.isfinite()
    if coefficients.dim() > 1 and ignore_index is not None:
        wrong &= (labels != ignore_index).unsqueeze(-1)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            "coefficients: expected finite numbers of float32, "
            f"got {coefficients[place].item()} at {place}"
        )


def backward(
    grads: dict[str, Tensor | None],  # of logps, entropy and lse, each [N] or None
    operands: Sequence[Operands],
    coefficients: Tensor,
    labels: Tensor,
    saved: Forward,
    spec: MixtureSpec,
    needs: Sequence[tuple[bool, bool, bool]],  # per head: d hidden, d weight, d bias
) -> list[Gradients]:
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        mixture = Mixture(operands, coefficients, labels, spec)
        rows = row_grads(mixture.heads[0], grads, saved)
        sums = [Sums(head, need) for head, need in zip(mixture.heads, needs, strict=True)]
        walk = _MixtureBackward(mixture, rows, grads["entropy"] is not None, sums)
        return walk.run(len(labels))


class Gradients(NamedTuple):
    """Of the operands of one head; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Sums:
    """What the gradients of one head are summed in: float32, rounded when complete."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.head, self.wanted = head, any(needs)
        n, (V, H) = len(head.hidden), head.weight.shape
        self.dhidden = head.zeros(n, H) if needs[0] else None
        self.dweight = head.empty(V, H, dtype=head.weight.dtype) if needs[1] else None
        self.dbias = head.zeros(V) if needs[2] else None
        self._dx = head.empty(0, dtype=head.gemm)
        # Of one block of tokens in float32 one product completes d weight where it stays.
        self._in_place = 0 < n <= head.plan.tiles.tokens and head.weight.dtype == torch.float32
        self._slab: Tensor | None = None

    def open(self, v0: int, v1: int) -> None:
        if self.dweight is None:
            return
        target = self.dweight[v0:v1]
        self._slab = target if self._in_place else cleared(self._slab, target)

    def add(self, dx: Tensor, words: Tensor, v0: int, a: int, b: int) -> None:
        """dx: [b - a, v] d loss / d products, in float32 or the dtype of the products."""
        if self.dbias is not None:
            self.dbias[v0 : v0 + dx.shape[1]] += dx.sum(0, dtype=torch.float32)
        if dx.dtype != self.head.gemm:
            if not len(self._dx):
                self._dx = self.head.empty(self.head.tile_cells, dtype=self.head.gemm)
            dx = tile_in(self._dx, *dx.shape).copy_(dx)
        if self.dhidden is not None:
            addmm_(self.dhidden[a:b], dx, words)
        if self._slab is not None:
            product = mm_ if self._in_place else addmm_
            product(self._slab, dx.t(), self.head.block(a, b))

    def close(self, v0: int, v1: int) -> None:
        if self.dweight is not None and self._slab is not None and not self._in_place:
            self.dweight[v0:v1] = self._slab

    def finish(self, tokens: int) -> Gradients:
        dhidden = self.dhidden
        if dhidden is not None:
            dhidden = self.head.sum_over_shards(dhidden).to(self.head.hidden.dtype)
            dhidden = self.head.spread(dhidden, tokens)
        return Gradients(dhidden, self.dweight, self.dbias)


class _MixtureBackward:
    """Vocabulary outside, tokens inside: the mixture's gradient, then each head's share of it."""

    def __init__(
        self, mixture: Mixture, rows: Tensor, entropy_grad: bool, sums: list[Sums]
    ) -> None:
        self.mixture, self.rows, self.entropy_grad, self.sums = mixture, rows, entropy_grad, sums

    def run(self, tokens: int) -> list[Gradients]:
        head = self.mixture.heads[0]
        for _, v0, v1 in head.vocab_tiles():
            words = self.mixture.words(v0, v1)
            for sums in self.sums:
                sums.open(v0, v1)
            for a, b in head.token_blocks():
                dz = self._dmixture(words, v0, a, b)
                for i, sums in enumerate(self.sums):
                    if sums.wanted:
                        sums.add(self._share(i, dz, words[i], v0, a, b), words[i], v0, a, b)
            for sums in self.sums:
                sums.close(v0, v1)
        return [sums.finish(tokens) for sums in self.sums]

    def _dmixture(self, words: list[Tensor], v0: int, a: int, b: int) -> Tensor:
        """d loss / d Σ m_i·z_i, written over the mixture's tile."""
        head = self.mixture.heads[0]
        tile = self.mixture.tile(words, v0, a, b)
        own, rows, logit_map = head.labels[a:b], self.rows[:, a:b], head.spec.logit_map
        head.kernels.backward(tile, None, v0, own, None, rows, logit_map, self.entropy_grad, tile)
        return tile

    def _share(self, i: int, dz: Tensor, words: Tensor, v0: int, a: int, b: int) -> Tensor:
        """d loss / d products of head i: dz times m_i·dz_i/dx."""
        mixture, logit_map = self.mixture, self.mixture.maps[i]
        factor = mixture.coefficients[a:b, i : i + 1] * logit_map.factor
        if logit_map.softcap is None:
            return torch.mul(dz, factor, out=mixture.part(a, b, len(words)))
        z = mixture.logits(i, words, v0, a, b)
        slope = z.div_(logit_map.cap).square_().neg_().add_(1.0)
        return slope.mul_(dz).mul_(factor)
