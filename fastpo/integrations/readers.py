"""What OpenRLHF and Axolotl read of logits by kernels of their own, where these are lazy.

On a GPU OpenRLHF gives them to flash-attn's cross-entropy and to a compiled entropy, and Axolotl,
in TRL's trainers, to two Triton kernels: these find them all.
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
    """Float32 [...] of logits [..., V] / temperature."""

    def __call__(self, logits: Any, labels: Tensor, temperature: float = 1.0) -> Any:
        promise = promise_of(logits)
        scaled = NotImplemented if promise is None else promise.scaled(1 / temperature)
        if scaled is NotImplemented or labels.shape != scaled.rows.shape:
            return self.original(logits, labels, temperature)
        return scaled.logps(labels)


class _Selected(Replacement):
    """Float32 [...] of logits [..., V], where one word of each is asked for."""

    def __call__(self, logits: Any, index: Tensor) -> Any:
        promise = promise_of(logits)
        if promise is None or index.shape != promise.rows.shape:
            return self.original(logits, index)
        return promise.logps(index)


class _Entropy(Replacement):
    """Float32 [...] of logits [..., V]."""

    def __call__(self, logits: Any, *chunk_size: int) -> Any:
        promise = promise_of(logits)
        if promise is None or promise.normalized:
            return self.original(logits, *chunk_size)
        return promise.stats(torch.zeros_like(promise.rows), "entropy").entropy


def _openrlhf(name: str, *parameters: str) -> Seam:
    return Seam("openrlhf.models.utils", name, parameters, ("0.11",))


def _axolotl(name: str, *parameters: str) -> Seam:
    return Seam("axolotl.monkeypatch.trainer.utils", name, parameters, ("0.19",))


_MADE: dict[str, dict[Seam, Make]] = {
    "OpenRLHF reads all logits": {
        _openrlhf("log_probs_from_logits", "logits", "labels", "temperature"): _Logps,
        _openrlhf("compute_entropy", "logits"): _Entropy,
    },
    "Axolotl's kernels read all logits": {
        _axolotl("selective_log_softmax", "logits", "index"): _Selected,
        _axolotl("entropy_from_logits", "logits", "chunk_size"): _Entropy,
    },
}
SEAMS = tuple(seam for made in _MADE.values() for seam in made)


def install() -> None:
    """Now where they are imported, else when they will be."""
    for otherwise, made in _MADE.items():
        replace_when_imported(made, partial(replace_where_they_fit, otherwise))


def remove() -> None:
    restore(*SEAMS)
