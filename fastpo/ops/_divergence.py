"""The walks of `linear_divergence`: two heads over the same words, one tile of each at a time.

D = Σ_v f(log p_v, log q_v) of student p and teacher q. With g_v = ∂f/∂log p_v and G = Σ_v g_v,

    dD/dz_v = g_v - p_v·G

and the same for the teacher. One walk finds both softmaxes, a second D and its G; the backward
multiplies every tile once more. In products: 4 forward, 2 more in the backward and one for each of
d hidden and d weight. Nothing wide is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _rows as R
from ._head import Head, HeadSpec
from ._logits import to_logits
from ._mixture import Gradients, Operands, _Sums

KINDS = ("forward_kl", "reverse_kl", "jsd", "alpha", "tvd")
_NEAR = 1e-6  # an alpha this close to 0 or 1 is that limit
_LARGEST = 40.0  # exponents of the alpha divergence
_LOWEST = -1e30  # a word both exclude: 0·(-inf - -inf) would be NaN


@dataclass(frozen=True)
class Rule:
    """Which divergence; `of` folds the limits of beta and alpha into the KLs."""

    kind: str
    parameter: float = 0.0

    @classmethod
    def of(cls, kind: str, beta: float, alpha: float) -> Rule:
        limits = {("jsd", 0.0): "forward_kl", ("jsd", 1.0): "reverse_kl"}
        if kind == "alpha":
            if abs(alpha - 1) < _NEAR or abs(alpha) < _NEAR:
                return cls("forward_kl" if abs(alpha - 1) < _NEAR else "reverse_kl")
            return cls(kind, alpha)
        return cls(limits.get((kind, float(beta)), kind), beta if kind == "jsd" else 0.0)

    def terms(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f, ∂f/∂s and ∂f/∂t of log-probabilities, cell by cell."""
        p, q = s.exp(), t.exp()
        if self.kind == "forward_kl":
            f = q * (t - s)
            return f, -q, f + q
        if self.kind == "reverse_kl":
            f = p * (s - t)
            return f, f + p, -p
        if self.kind == "jsd":
            beta = self.parameter
            mixture = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
            # What moves the mixture cancels between the two terms.
            ds, dt = (1 - beta) * p * (s - mixture), beta * q * (t - mixture)
            return ds + dt, ds, dt
        if self.kind == "alpha":
            alpha = self.parameter
            f = (alpha * t + (1 - alpha) * s).clamp_max(_LARGEST).exp() / (alpha * (alpha - 1))
            return f, (1 - alpha) * f, alpha * f
        sign = 0.5 * torch.sign(p - q)
        return sign * (p - q), sign * p, -sign * q

    def value(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """D from Σ f, and where its gradient has ended."""
        if self.kind != "alpha":
            return total, None
        scale = self.parameter * (self.parameter - 1)
        sums = total * scale
        capped = sums >= math.exp(_LARGEST)
        largest = math.expm1(_LARGEST)
        return torch.where(capped, torch.full_like(sums, largest), sums - 1) / scale, capped


@dataclass(frozen=True)
class DivergenceSpec:
    """All that is not a tensor in one call."""

    head: HeadSpec
    maps: tuple[R.LogitMap, R.LogitMap]
    dtypes: tuple[torch.dtype, torch.dtype]
    rule: Rule


@dataclass(frozen=True)
class Saved:
    """[N] each: maximum and log-mass of both heads, Σ of both derivatives over the words."""

    constants: Tensor  # [6, N]
    divergence: Tensor
    entropy: Tensor


class _Heads:
    """Both heads; their rows are compacted alike, because they share the labels."""

    def __init__(self, operands: Sequence[Operands], labels: Tensor, spec: DivergenceSpec) -> None:
        self.heads = [
            Head(x.hidden, x.weight, x.bias, labels, replace(spec.head, compute_dtype=dtype))
            for x, dtype in zip(operands, spec.dtypes, strict=True)
        ]
        self.maps, self.rule = spec.maps, spec.rule

    def logits(self, i: int, words: Tensor, v0: int, a: int, b: int) -> Tensor:
        head = self.heads[i]
        return to_logits(head.products(head.block(a, b), words), v0, head.bias, self.maps[i])

    def logps(self, words: Sequence[Tensor], v0: int, part: slice, rows: Tensor) -> list[Tensor]:
        """log-probabilities of one tile under both, in the heads' own buffers."""
        found = []
        for i in range(2):
            z = self.logits(i, words[i], v0, part.start, part.stop)
            shift, mass = rows[2 * i, part].unsqueeze(1), rows[2 * i + 1, part].unsqueeze(1)
            found.append(z.sub_(shift).sub_(mass).clamp_min_(_LOWEST))
        return found


def forward(operands: Sequence[Operands], labels: Tensor, spec: DivergenceSpec) -> Saved:
    device = operands[0].hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        heads = _Heads(operands, labels, spec)
        first = heads.heads[0]
        rows = torch.zeros(6, len(first.hidden), device=device)
        sums = torch.zeros(len(first.hidden), dtype=torch.float64, device=device)
        entropy = torch.zeros_like(sums)
        for a, b in first.token_blocks():
            part = slice(a, b)
            _softmaxes(heads, part, rows)
            for _, v0, v1 in first.vocab_tiles():
                words = [head.words(v0, v1) for head in heads.heads]
                s, t = heads.logps(words, v0, part, rows)
                f, ds, dt = heads.rule.terms(s, t)
                # Tile by tile in float64: the sum over a vocabulary rounds once.
                sums[part] += f.sum(1)
                rows[4, part] += ds.sum(1)
                rows[5, part] += dt.sum(1)
                entropy[part] -= (s.exp() * s).sum(1)
        divergence, ended = heads.rule.value(sums)
        # A divergence is not negative; what is, is rounding. NaN stays.
        found = [x.clamp_min(0).float() for x in (divergence, entropy)]
        return Saved(
            _all(first, _stopped(rows, ended), len(labels)),
            *(_all(first, x, len(labels)) for x in found),
        )


def _stopped(rows: Tensor, ended: Tensor | None) -> Tensor:
    """NaN where the gradient has ended: a mark the backward turns into zeros."""
    if ended is None:
        return rows
    return torch.cat((rows[:4], rows[4:].masked_fill(ended, float("inf"))))


def _softmaxes(heads: _Heads, part: slice, rows: Tensor) -> None:
    """Maximum and log Σ exp(z - maximum) of both heads, for one block of tokens."""
    lowest = torch.finfo(torch.float32).min
    state = rows.new_zeros(2, 2, part.stop - part.start)
    state[:, 0] = float("-inf")
    for _, v0, v1 in heads.heads[0].vocab_tiles():
        for i, head in enumerate(heads.heads):
            z = heads.logits(i, head.words(v0, v1), v0, part.start, part.stop)
            before, mass = state[i]
            top = torch.maximum(before, z.amax(1))
            reference = top.clamp_min(lowest)  # -inf - -inf, where a tile is masked out, is NaN
            new = z.sub_(reference.unsqueeze(1)).exp_().sum(1)
            state[i, 1] = mass * torch.exp(before - reference) + new
            state[i, 0] = top
    rows[0, part], rows[2, part] = state[0, 0], state[1, 0]
    rows[1, part], rows[3, part] = state[0, 1].log(), state[1, 1].log()


def _all(head: Head, x: Tensor, tokens: int) -> Tensor:
    """Back to all N rows in the last dimension, 0 where not scored."""
    if head.ignored is not None:
        return x.masked_fill(head.ignored, 0)
    if head.rows is None:
        return x
    return x.new_zeros(*x.shape[:-1], tokens).index_copy_(-1, head.rows, x)


def backward(
    grad: Tensor,  # [N]
    operands: Sequence[Operands],
    labels: Tensor,
    constants: Tensor,  # [6, N]
    spec: DivergenceSpec,
    needs: Sequence[tuple[bool, bool, bool]],  # per head: d hidden, d weight, d bias
) -> list[Gradients]:
    with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
        heads = _Heads(operands, labels, spec)
        first = heads.heads[0]
        if first.rows is not None:
            grad, constants = grad[first.rows], constants[:, first.rows]
        grad = grad.float()
        # Where the gradient has ended, or nothing is scored: select, 0·inf would be NaN.
        silent = constants[4:].isinf().any(0)
        silent = silent if first.ignored is None else silent | first.ignored
        constants = torch.cat((constants[:4], constants[4:].masked_fill(silent, 0)))
        sums = [_Sums(head, need) for head, need in zip(heads.heads, needs, strict=True)]
        for _, v0, v1 in first.vocab_tiles():
            words = [head.words(v0, v1) for head in heads.heads]
            for one in sums:
                one.open(v1 - v0)
            for a, b in first.token_blocks():
                part = slice(a, b)
                dz = _dlogits(heads, words, v0, part, constants)
                for i, one in enumerate(sums):
                    if one.wanted:
                        dx = dz[i] * grad[part].unsqueeze(1)
                        dx = dx.masked_fill_(silent[part].unsqueeze(1), 0)
                        one.add(dx, words[i], v0, a, b)
            for one in sums:
                one.close(v0, v1)
        return [one.finish(len(labels)) for one in sums]


def _dlogits(
    heads: _Heads, words: Sequence[Tensor], v0: int, part: slice, constants: Tensor
) -> list[Tensor]:
    """d D / d products of both heads for one tile."""
    s, t = heads.logps(words, v0, part, constants)
    _, *derivatives = heads.rule.terms(s, t)
    found = []
    for i, (logp, derivative) in enumerate(zip((s, t), derivatives, strict=True)):
        dz = derivative.sub_(logp.exp() * constants[4 + i, part].unsqueeze(1))
        logit_map = heads.maps[i]
        if logit_map.softcap is not None:
            shift, mass = constants[2 * i, part], constants[2 * i + 1, part]
            z = logp + shift.unsqueeze(1) + mass.unsqueeze(1)
            dz = dz * logit_map.cap_slope(z.clamp_min(-logit_map.cap))
        found.append(dz.mul_(logit_map.factor))
    return found
