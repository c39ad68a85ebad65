"""Pairs that look at the rest of the batch. Family "pairs".

Local batch only: gather over ranks first for the full one. All return [B].
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import avg, mean_or_zero
from ._parameters import Positive, Unit
from ._registry import objective
from .pairs_logps import simpo


@objective("rpo_relative", paper="arXiv:2402.10958", family="pairs")
def rpo_relative(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    prompt_embeddings: Tensor,  # [B, D]
    *,
    beta: Annotated[float, Positive] = 0.1,
    tau: Annotated[float, Positive] = 0.5,
) -> Tensor:  # [B] nats
    """mean_j -log σ(β·W_ij·(a_i - b_j)): chosen i against every rejected j of the batch.

    W_ij = softmax_j((cos(e_i, e_j) - 1)/τ), norms at least 1e-8, inside the logistic.
    """
    # In float64, which autocast leaves alone: trainers compute their loss under it.
    directions = F.normalize(prompt_embeddings, dim=-1, eps=1e-8).double()
    cosines = (directions @ directions.T).to(prompt_embeddings.dtype)
    weights = torch.softmax((cosines - 1) / tau, -1)
    gaps = chosen_logratios[:, None] - rejected_logratios[None, :]
    return -F.logsigmoid(beta * weights * gaps).mean(-1)


@objective("sspo", family="pairs")
def sspo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    unlabeled_logps: Tensor,  # [U] nats
    unlabeled_lengths: Tensor,  # [U] int64
    *,
    beta: Annotated[float, Positive] = 2.0,
    gamma: float = 1.0,
    weight: Annotated[float, Unit] = 0.5,
    prior: Annotated[float, Unit] = 0.5,
    mean: float = 0.0,
    std: Annotated[float, Positive] = 1.0,
    clip: Annotated[float, Positive] = 5.0,
) -> Tensor:  # [B] nats
    """weight·simpo + (1 - weight)·(mean over the unlabeled, 0 without).

    An unlabeled response costs prior·(-log σ(u)) if u > 0, else (1 - prior)·(-log σ(-u)), with
    u = β·(z(û) - T), z(x) = clamp((x - mean)/std, ±clip) of average log-probabilities and T the
    smallest z among the chosen, which carries a gradient. Mean and std are the caller's.
    """
    labeled = (chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    rows = simpo(*labeled, beta=beta, gamma=gamma)
    if rows.numel() == 0:  # no threshold, and no row that would want one
        return rows

    def standard(logps: Tensor, lengths: Tensor) -> Tensor:
        return ((avg(logps, lengths) - mean) / std).clamp(-clip, clip)

    threshold = standard(chosen_logps, chosen_lengths).min()
    u = beta * (standard(unlabeled_logps, unlabeled_lengths) - threshold)
    good, bad = -prior * F.logsigmoid(u), -(1 - prior) * F.logsigmoid(-u)
    unlabeled = mean_or_zero(torch.where(u > 0, good, bad))
    return weight * rows + (1 - weight) * unlabeled
