"""The row kernels of `linear_divergence`: over two tiles of raw products [n, v], one per head.

The student is side 0, the teacher side 1. Both heads have the same words, so a row's tiles are of
the same tokens and columns. State, float32 [STATE, n], folded tile by tile:

    MAX, MASS        m = max z and Σ exp(z - m), student; MAX + 2 and MASS + 2 are the teacher's
    CROSS            Σ exp(u_a)·(u_a - u_b), u = z - m, a the head that `over` names
    MOMENT           Σ exp(u)·u of the student

With them a KL divergence needs one walk over the vocabulary. The others need both softmaxes first:
`values` sums their terms, and `gradients` turns tiles into d D / d products for every kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..backend import LogitMap

MAX, MASS, CROSS, MOMENT = 0, 1, 4, 5
STATE = 6
INITIAL_STATE = (float("-inf"), 0.0, float("-inf"), 0.0, 0.0, 0.0)

# Rows of `constants`, float32 [CONSTANTS, n]: l = max((z - SHIFT) - LOG_MASS, LOWEST); + 2 for the
# teacher. Apart, because their sum would round at the size of the logits.
SHIFT, LOG_MASS = 0, 1
CONSTANTS = 4

# Rows of `factors`, float32 [FACTORS, n].
TOTAL, GRAD = 0, 2  # Σ_v ∂f/∂l of the student, then of the teacher; what multiplies the row
FACTORS = 3

# Rows of `sums`, float64 [SUMS, n]: of f, ∂f/∂l_student, ∂f/∂l_teacher.
SUMS = 3

KINDS = ("forward_kl", "reverse_kl", "jsd", "alpha", "tvd")
NEAR = 1e-6  # an alpha this close to 0 or 1 is that limit
LARGEST = 40.0  # exponents of the alpha divergence stop here
LOWEST = -1e30  # a word both exclude: 0·(-inf - -inf) would be NaN


@dataclass(frozen=True)
class Rule:
    """Which divergence; `of` folds the limits of beta and alpha into the KLs."""

    kind: str
    parameter: float = 0.0

    @classmethod
    def of(cls, kind: str, beta: float, alpha: float) -> Rule:
        limits = {("jsd", 0.0): "forward_kl", ("jsd", 1.0): "reverse_kl"}
        if kind == "alpha":
            if abs(alpha - 1) < NEAR or abs(alpha) < NEAR:
                return cls("forward_kl" if abs(alpha - 1) < NEAR else "reverse_kl")
            return cls(kind, alpha)
        return cls(limits.get((kind, float(beta)), kind), beta if kind == "jsd" else 0.0)

    @property
    def over(self) -> int | None:
        """The side whose expectation a KL is; None for the divergences of two walks."""
        return {"reverse_kl": 0, "forward_kl": 1}.get(self.kind)

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
            alpha, rest = self.parameter, 1 - self.parameter
            e = (alpha * t + rest * s).clamp_max(LARGEST).exp()
            # (p - e)/α and (q - e)/(1 - α), as products: near α = 0 and 1 only rounding would be
            # left of the differences.
            gap = 0.5 * (t - s)
            ds = (e + p) * torch.tanh(alpha * gap) / -alpha
            dt = (e + q) * torch.tanh(rest * gap) / rest
            return ds + dt, ds, dt
        sign = 0.5 * torch.sign(p - q)
        return sign * (p - q), sign * p, -sign * q

    def value(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """D from Σ f, and where its gradient has ended."""
        if self.kind != "alpha":
            return total, None
        largest = math.expm1(LARGEST) / (self.parameter * (self.parameter - 1))
        # A sum of one capped exponential falls short of its value by rounding, the more so where a
        # large α lets ∂f/∂s and ∂f/∂t cancel.
        capped = total / largest >= (1 - 1e-5) / (1 + abs(self.parameter) * 2**-21)
        return total.masked_fill(capped, largest), capped


@dataclass(frozen=True)
class Side:
    """One head's part of a tile."""

    tile: Tensor  # [n, v] float32 raw products, read only
    bias: Tensor | None  # [V] float32
    logit_map: LogitMap


Sides = tuple[Side, Side]


class PairKernels(Protocol):
    """A backend module offers these three functions."""

    def softmaxes(
        self,
        sides: Sides,
        first: int,  # word of the first column
        state: Tensor,  # [STATE, n] float32, updated
        over: int | None,  # fold CROSS over this side's softmax
        entropy: bool,  # fold MOMENT
    ) -> None: ...

    def values(
        self,
        sides: Sides,
        first: int,
        constants: Tensor,  # [CONSTANTS, n] float32
        rule: Rule,
        sums: Tensor,  # [SUMS, n] float64, added to
    ) -> None: ...

    def gradients(
        self,
        sides: Sides,
        first: int,
        constants: Tensor,  # [CONSTANTS, n] float32
        factors: Tensor,  # [FACTORS, n] float32
        rule: Rule,
        outs: tuple[Tensor | None, Tensor | None],  # [n, v] float32/bf16/fp16, written
    ) -> None:
        """out = GRAD·(∂f/∂l - exp(l)·TOTAL)·dz/dx; 0 in rows whose GRAD is 0, whatever is there."""
