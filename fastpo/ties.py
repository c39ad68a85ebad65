"""Which entropies are equal when a quantile is asked: those of one context.

A log-probability near 0 keeps its digits because sums over the vocabulary leave the label's cell
out and add it last. So the entropies of one context differ in their last bits with the word that
follows, where a softmax of all logits gives one number, and a threshold between them would part
what belongs together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_ROUNDING = 8 * torch.finfo(torch.float32).eps


def lowest(entropy: Tensor, chosen: Tensor) -> Tensor:
    """The lowest entropy [...] that is `chosen` [...] bool, a scalar; infinity where none is."""
    return F.pad(entropy.masked_fill(~chosen, math.inf).flatten(), (0, 1), value=math.inf).min()


def reaches(entropy: Tensor, least: Tensor) -> Tensor:
    """Where entropy [...] is at least `least` or equals it but for rounding; bool."""
    return entropy >= least * (1 - _ROUNDING)
