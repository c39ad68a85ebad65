"""What OpenRLHF reads of its Actor's logits, where they are lazy.

On a GPU it gives them to flash-attn's cross-entropy and to a compiled entropy, which find them all.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .lazy.logits import promise_of
from .seams.seam import (
    Make,
    Replacement,
    Seam,
    replace_when_imported,
    replace_where_they_fit,
    restore,
)


class _Logps(Replacement):
    """`log_probs_from_logits`: float32 [...] of logits [..., V] / temperature."""

    def __call__(self, logits: Any, labels: Tensor, temperature: float = 1.0) -> Any:
        promise = promise_of(logits)
        scaled = NotImplemented if promise is None else promise.scaled(1 / temperature)
        if scaled is NotImplemented or labels.shape != scaled.rows.shape:
            return self.original(logits, labels, temperature)
        return scaled.logps(labels)


class _Entropy(Replacement):
    """`compute_entropy`: float32 [...]."""

    def __call__(self, logits: Any) -> Any:
        promise = promise_of(logits)
        if promise is None or promise.normalized:
            return self.original(logits)
        return promise.stats(torch.zeros_like(promise.rows), "entropy").entropy


_OTHERWISE = "OpenRLHF reads all logits"
_MODULE, _VERSIONS = "openrlhf.models.utils", ("0.11",)
_MADE: dict[Seam, Make] = {
    Seam(_MODULE, "log_probs_from_logits", ("logits", "labels", "temperature"), _VERSIONS): _Logps,
    Seam(_MODULE, "compute_entropy", ("logits",), _VERSIONS): _Entropy,
}
SEAMS = tuple(_MADE)


def install() -> None:
    """Now where OpenRLHF is imported, else when it will be."""
    replace_when_imported(_MADE, partial(replace_where_they_fit, _OTHERWISE))


def remove() -> None:
    restore(*SEAMS)
