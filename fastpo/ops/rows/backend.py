"""What a backend is: row kernels over a float32 tile of raw products [n, v], and over rows alone.

The driver multiplies matrices; a backend turns a tile into statistics (`forward`) and into
d loss / d products (`backward`), brings sums beside an anchor to another (`rescale`), says what a
folded row is (`finish`), and what its gradients ask of `backward` (`row_grads`). It never sees
which loss runs.

State, float32 [len(STATE), n], folded tile by tile; `m` is the running maximum of the row and
"others" are all words but the label:

    MAX      m = max z                      OTHERS   Σ exp(z - m)         over the others
    TARGET   z of the label                 MOMENT   Σ exp(z - m)·(z - m) over the others
    SQUARES  Σ exp(2(z - m)), others        SUM      Σ z
    BEFORE   max z over words before the label

MAX, OTHERS and TARGET are always folded, the rest by flag. TARGET starts as NaN, so a label outside
the vocabulary poisons its own row and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MAX, OTHERS, TARGET, MOMENT, SQUARES, SUM, BEFORE = range(7)
STATE = 7
INITIAL_STATE = (float("-inf"), 0.0, float("nan"), 0.0, 0.0, 0.0, float("-inf"))

# Bits of `stats`, by the output that asks for the field.
STATS = {"entropy": 1, "log_sum_sq_probs": 2, "mean_logits": 4, "is_top1": 8}

# Rows of `grads`, float32 [GRADS, n]. log p = (z - SHIFT) - LOG_MASS: the maximum and the log-sum
# beside it come separately, because their sum would round at the size of the logits.
SHIFT, LOG_MASS, COMMON, ENTROPY, LABEL = range(5)
GRADS = 5

# exp(z) is 0 in float32 long before; keeps 0·(-inf) out of the entropy terms.
LOG_FLOOR = -200.0


def filled_rows(values: Sequence[float], n: int, device: torch.device) -> Tensor:
    """float32 [len(values), n], filled on the device: a copy from the host would wait for a GPU."""
    rows = torch.zeros(len(values), n, dtype=torch.float32, device=device)
    for row, value in enumerate(values):
        if value != 0:
            rows[row].fill_(value)
    return rows


@dataclass(frozen=True)
class LogitMap:
    """z = softcap(logit_scale·(x + bias)) / temperature, x the raw product.

    inverse: what z of each row is multiplied with in the place of 1/temperature, which is 1 then;
        in float64, to be rounded once, as 1/temperature is.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    inverse: Tensor | None = None  # [n] float64

    @classmethod
    def of(cls, temperature: float, softcap: float | None, logit_scale: float) -> LogitMap:
        """Of any real numbers."""
        cap = None if softcap is None else float(softcap)
        return cls(float(temperature), cap, float(logit_scale))

    def rows(self, a: int, b: int) -> LogitMap:
        """Of rows a to b."""
        return self if self.inverse is None else replace(self, inverse=self.inverse[a:b])

    def tempered(self, number: float, like: Tensor) -> Tensor | float:
        """`number` over each row's own temperature, to multiply `like` [n] or [n, v] with."""
        if self.inverse is None:
            return number
        numbers = (number * self.inverse).float()
        return numbers if like.dim() == 1 else numbers.unsqueeze(1)

    @property
    def factor(self) -> float:
        """dz/dx without the soft-cap and `inverse`."""
        return self.logit_scale / self.temperature

    @property
    def cap(self) -> float:
        """The soft-cap in units of z, but for `inverse`; 0 when there is none."""
        return 0.0 if self.softcap is None else self.softcap / self.temperature

    def cap_slope(self, z: Tensor) -> Tensor | float:
        """What the soft-cap multiplies dz/dx with, from z itself."""
        return 1.0 if self.softcap is None else 1.0 - (z / self.tempered(self.cap, z)).square()


def headroom(dtype: torch.dtype) -> float:
    """Stored exponentials are exp(z - m + headroom).

    float16 loses everything below 6e-8 of the maximum, which over 10**5 words is mass that counts:
    anchored at 2**14 it reaches down to 4e-12.
    """
    return 14 * 0.6931471805599453 if dtype == torch.float16 else 0.0


class Saved(NamedTuple):
    """What the backward has of the forward's results, each [n] float32."""

    logps: Tensor
    maximum: Tensor
    log_mass: Tensor
    target: Tensor
    entropy: Tensor | None  # where its gradient is wanted


class Upstream(NamedTuple):
    """d loss / d results, each [n] float32; None: 0."""

    logps: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None


class RowKernels(Protocol):
    """A backend module offers these five functions and `unavailable`."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot serve the device; None when it can."""

    def forward(
        self,
        tile: Tensor,  # [n, v] float32 raw products
        first: int,  # word of the tile's first column
        labels: Tensor,  # [n] int64
        bias: Tensor | None,  # [V] float32
        state: Tensor,  # [STATE, n] float32, updated
        logit_map: LogitMap,
        stats: int,
        kept: Tensor | None,  # [n, v] float32/bf16/fp16, written: exp(z - anchor), 0 at the label
        anchors: Tensor | None,  # [n] float32, written: new running maximum - headroom(kept.dtype)
        fold_cap: bool,  # multiply `kept` by the slope of the soft-cap
    ) -> None: ...

    def backward(
        self,
        source: Tensor,  # [n, v] float32 raw products, or `kept` when anchors is given
        anchors: Tensor | None,  # [n] float32
        first: int,
        labels: Tensor,  # [n] int64
        bias: Tensor | None,  # [V] float32
        grads: Tensor,  # [GRADS, n] float32
        logit_map: LogitMap,
        entropy_grad: bool,
        out: Tensor,  # [n, v] d loss / d products, may be `source` itself when dtypes agree
    ) -> None:
        """out = exp(l)·(COMMON - ENTROPY·l)·dz/dx with l = max((z - SHIFT) - LOG_MASS, LOG_FLOOR).

        In the label's column out = LABEL, which already carries dz/dx. From `kept`, exp(l) is
        kept·exp((anchor - SHIFT) - LOG_MASS) and z is log(kept) + anchor.
        """

    def rescale(
        self,
        total: Tensor,  # [n, h] float32 sums of exp(z - before)·(...), updated
        before: Tensor,  # [n] float32
        anchors: Tensor,  # [n] float32
    ) -> None:
        """total = total·exp(before - anchors) of each row."""

    def finish(
        self,
        state: Tensor,  # [STATE, n] float32, of all words
        stats: tuple[str, ...],  # of entropy, log_sum_sq_probs and is_top1
        ignored: Tensor | None,  # [n] bool: rows whose results are 0
    ) -> dict[str, Tensor]:
        """`stats`, logps, lse, target, maximum and log_mass, each [n]: float32, is_top1 bool.

        log_mass is log Σ exp(z - m) over all words.
        """

    def row_grads(
        self,
        saved: Saved,
        upstream: Upstream,
        logit_map: LogitMap,
        ignored: Tensor | None,  # [n] bool: rows without gradient
    ) -> Tensor:
        """[GRADS, n] float32, of rows without gradient all 0 beside an infinite LOG_MASS."""
