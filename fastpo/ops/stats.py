"""What a token's softmax is described by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token results with the leading shape of `labels`; None where not requested, 0 if ignored.

    logps: log p(label), float32, nats.  entropy: -Σ p log p, float32, nats.
    log_sum_sq_probs: log Σ p², float32.  mean_logits: mean of z over the vocabulary, float32.
    is_top1: bool, the label has the largest z; in a tie the first word has it.
    lse: log Σ exp z, float32, nats.  Gradient flows from logps, entropy and lse.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    lse: Tensor | None = None


def handed_out(results: dict[str, Tensor], shape: torch.Size) -> TokenStats:
    """Of that shape, the caller's to write into: the backward reads what was saved."""
    saved = any(x.requires_grad for x in results.values())
    found = {name: x.view(shape) for name, x in results.items()}
    return TokenStats(**{name: x.clone() if saved else x for name, x in found.items()})
