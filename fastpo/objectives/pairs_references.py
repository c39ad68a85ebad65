"""Pairs, under other models than one reference: past policies, mixtures. Family "pairs".

`c, r` are the chosen and rejected log-probabilities and `c0, r0` the reference's, in nats; the gap
of a model is its log-probability of chosen minus that of rejected. All return [B].
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from ._parameters import NonNegative, Positive, Unit
from ._registry import objective
from .pairs import dpo

Weights = Annotated[Sequence[float] | None, NonNegative]


def _shares(name: str, weights: Sequence[float], count: int) -> list[float]:
    """Weights of `count` models divided by their sum."""
    total = sum(weights)
    if len(weights) != count or not 0 < total < math.inf:
        raise ValueError(f"{name}: expected {count} numbers with a positive sum, got {weights!r}")
    return [weight / total for weight in weights]


@objective("spa", paper="arXiv:2406.04412", family="pairs")
def spa(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    mixed_chosen_logps: Tensor,  # [B] nats, under the mixture of policy and reference logits
    mixed_rejected_logps: Tensor,  # [B] nats
    ref_chosen_logps: Tensor,  # [B] nats
    ref_rejected_logps: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, Unit] = 0.1,
    threshold: float = 0.0,
) -> Tensor:  # [B] nats
    """L(β·Δ; t): t = 1 where g > threshold, else 1 - α; g = β·(mixed gap - reference gap).

    threshold is the caller's running quantile of recent g; g carries no gradient.
    """
    mixed = mixed_chosen_logps - mixed_rejected_logps
    gap = beta * (mixed - (ref_chosen_logps - ref_rejected_logps))
    labels = 1 - alpha * (gap <= threshold).to(mixed.dtype)
    labels = labels.masked_fill(gap.isnan(), math.nan)
    return dpo(chosen_logratios, rejected_logratios, soft_labels=labels, beta=beta)


@objective("mnpo", family="pairs")
def mnpo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    ref_chosen_logps: Tensor,  # [B] nats
    ref_rejected_logps: Tensor,  # [B] nats
    history_chosen_logps: Tensor,  # [K, B] nats
    history_rejected_logps: Tensor,  # [K, B] nats
    *,
    ratio: Annotated[float, Unit] = 1 / 3,
    eta: Annotated[float, Positive] = 0.0075,
    history_weights: Weights = None,
) -> Tensor:  # [B] nats²
    """(h - 1/(2η))², h = (c - r) - ratio·(c0 - r0) - (1 - ratio)·Σ_k λ_k·(gap of past policy k).

    λ is history_weights divided by their sum, uniform without; Multiplayer Nash PO.
    """
    gaps = history_chosen_logps - history_rejected_logps
    count = len(gaps)
    shares = (
        [1 / max(count, 1)] * count
        if history_weights is None
        else _shares("history_weights", history_weights, count)
    )
    h = chosen_logps - rejected_logps - ratio * (ref_chosen_logps - ref_rejected_logps)
    # Numbers times rows: a tensor of the weights would be a copy to the device on every call.
    for share, gap in zip(shares, gaps, strict=True):
        h = h - (1 - ratio) * share * gap
    return (h - 1 / (2 * eta)).square()


@objective("inpo", paper="arXiv:2407.00617", family="pairs")
def inpo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    ref_chosen_logps: Tensor,  # [B] nats
    ref_rejected_logps: Tensor,  # [B] nats
    prev_chosen_logps: Tensor,  # [B] nats, under the previous iterate
    prev_rejected_logps: Tensor,  # [B] nats
    *,
    ratio: Annotated[float, Unit] = 1 / 3,
    eta: Annotated[float, Positive] = 0.0075,
) -> Tensor:  # [B] nats²
    """(h - 1/(2η))², h = (c - r) - ratio·(c0 - r0) - (1 - ratio)·(previous gap), ratio = τ/η."""
    models = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    history = (prev_chosen_logps[None], prev_rejected_logps[None])
    return mnpo(*models, *history, ratio=ratio, eta=eta)


@objective("apo_accelerated", paper="arXiv:2410.06293", family="pairs")
def apo_accelerated(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    history_chosen_logps: Tensor,  # [2, B] nats: the latest solution, the one before
    history_rejected_logps: Tensor,  # [2, B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, NonNegative] = 0.3,
) -> Tensor:  # [B] nats
    """-log σ(β·Δ) against the reference (1 + α)·h0 - α·h1, whose normaliser cancels."""
    shape = tuple(history_chosen_logps.shape)
    if shape[0] != 2:
        raise ValueError(f"history_chosen_logps: expected shape (2, {shape[1]}), got {shape}")
    chosen, rejected = (
        (1 + alpha) * latest - alpha * before
        for latest, before in (history_chosen_logps, history_rejected_logps)
    )
    return dpo(chosen_logps - chosen, rejected_logps - rejected, beta=beta)


def _log_weights(
    chosen: Tensor, rejected: Tensor, weights: Sequence[float] | None
) -> Tensor | list[float]:
    """log w_k of every reference, [K, B] or [K]; w ~ |gap| per pair when none are given."""
    if weights is not None:
        shares = _shares("weights", weights, len(chosen))
        return [math.log(share) if share > 0 else -math.inf for share in shares]
    gaps = (chosen - rejected).abs()
    total = gaps.sum(0)
    return torch.where(total > 0, gaps / total, 1 / len(gaps)).log()


@objective("mrpo", paper="arXiv:2405.16388", family="pairs")
def mrpo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    history_chosen_logps: Tensor,  # [K, B] nats, under K references; the first is the base
    history_rejected_logps: Tensor,  # [K, B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    weights: Weights = None,
    clip: Annotated[float | None, NonNegative] = 0.1,
) -> Tensor:  # [B] nats
    """-log σ(β·Δ) against the harmonic mixture ref* = -log Σ_k w_k·exp(-ref_k), per side.

    w_k ~ |gap of reference k| per pair (all 0: uniform), or `weights`; divided by their sum, 0
    drops the reference. References after the base are first clipped into [ref_0·(1 + clip),
    ref_0·(1 - clip)]: log-probabilities are negative. clip None: not clipped.
    """
    if len(history_chosen_logps) == 0:
        shape = tuple(history_chosen_logps.shape)
        raise ValueError(f"history_chosen_logps: expected at least one reference, got {shape}")
    logs = _log_weights(history_chosen_logps, history_rejected_logps, weights)

    def mixture(references: Tensor) -> Tensor:
        base = references[0]
        if clip is not None:
            near = references[1:].clamp(base * (1 + clip), base * (1 - clip))
            references = torch.cat([base[None], near])
        terms = [log - ref for log, ref in zip(logs, references, strict=True)]
        return -torch.stack(terms).logsumexp(0)

    chosen, rejected = mixture(history_chosen_logps), mixture(history_rejected_logps)
    return dpo(chosen_logps - chosen, rejected_logps - rejected, beta=beta)
