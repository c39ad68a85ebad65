"""`diagnose`: how far a trainer's log-probabilities are from its sampler's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BAND = 0.9, 1.1
_QUANTILES = {"q01": 0.01, "median": 0.5, "q99": 0.99}


class Mismatch(NamedTuple):
    """Of the ratio p_trainer / p_sampler of `tokens` sampled tokens; 1 everywhere is no mismatch.

    mean: of the ratio.  outside: the share of tokens with a ratio outside [0.9, 1.1].
    q01, median, q99: quantiles of its logarithm, nats.  largest: of its absolute logarithm, nats.
    kept_mass: mean probability of the words that the sampler kept; None where it is not known.
    """

    tokens: int
    mean: float
    outside: float
    q01: float
    median: float
    q99: float
    largest: float
    kept_mass: float | None = None

    def log(self, prefix: str = "sampler/") -> dict[str, float]:
        """Numbers under names for a trainer's log."""
        found = self._asdict().items()
        return {prefix + name: float(x) for name, x in found if x is not None and name != "tokens"}


@torch.no_grad()
def diagnose(
    sampler_logps: Tensor,
    logps: Tensor,
    *,
    mask: Tensor | None = None,
    whole_logps: Tensor | None = None,
) -> Mismatch:
    """The trainer's `logps` beside what the sampler said of the same tokens, at the same weights.

    A ratio that is not 1 there is noise in every importance weight. Where the sampler left words
    out (top-k, top-p, min-p) and `logps` are over all of them, the mean falls to the mass that it
    kept; see `support` of `fastpo.linear_logps`. Tokens whose sampler_logps are NaN, as engines
    mark what they do not know, are left out.

    sampler_logps, logps: [...] nats.
    mask: [...] bool or 0 and 1, tokens that were sampled; None: all.
    whole_logps: [...] nats, log-probabilities over the whole vocabulary, beside `logps` over the
        words that were kept: their ratio is the mass of these.
    Waits for the device once. Raises ValueError for what is no tensor, for shapes that differ and
    where no token is left.
    """
    named = {"sampler_logps": sampler_logps, "logps": logps, "mask": mask}
    for name, x in {**named, "whole_logps": whole_logps}.items():
        if x is None and name in ("mask", "whole_logps"):
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.shape != sampler_logps.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(sampler_logps.shape)}, got {tuple(x.shape)}"
            )
    counted = ~sampler_logps.isnan()
    if mask is not None:
        counted = counted & (mask != 0)
    gap = (logps.double() - sampler_logps)[counted]
    if not gap.numel():
        raise ValueError("mask: expected sampled tokens, got none")
    ratio = gap.exp()
    least, most = _BAND
    outside = (~((ratio >= least) & (ratio <= most))).double().mean()  # also one that is NaN
    levels = torch.tensor(list(_QUANTILES.values()), dtype=torch.float64, device=gap.device)
    numbers = [ratio.mean(), outside, *_quantiles(gap, levels), gap.abs().max()]
    if whole_logps is not None:
        numbers.append((whole_logps.double() - logps)[counted].exp().mean())
    return Mismatch(gap.numel(), *torch.stack(numbers).tolist())


def _quantiles(x: Tensor, levels: Tensor) -> Tensor:
    """Linear between ranks; torch.quantile takes no more than 2**24 numbers.

    Beside an infinite one there is no line: there it is the nearer of the two.
    """
    ranked = x.sort().values
    place = levels * (len(ranked) - 1)
    rank = place.long()
    share = place - rank
    low, high = ranked[rank], ranked[(rank + 1).clamp_max(len(ranked) - 1)]
    nearer = torch.where(share < 0.5, low, high)
    return torch.where(low.isinf() | high.isinf(), nearer, low + share * (high - low))
