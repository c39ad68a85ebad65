"""Single responses: one row per completion, desirable or not. All return [N].

`x` is the log-ratio of the row, in nats. A batch with only one kind of label is legal everywhere.
"""

from typing import Annotated

import torch
from torch import Tensor

from ._math import REDUCTIONS, mean_or_zero, nll_term
from ._registry import NonNegative, OneOf, Positive, objective


@objective("nll", family="singles")
def nll(
    logps: Tensor,  # [N] nats
    lengths: Tensor,  # [N] int64
    *,
    reduction: Annotated[str, OneOf(*REDUCTIONS)] = "batch",
) -> Tensor:  # [N] nats
    """NLL(logps, lengths; reduction); "batch" averages to the token mean."""
    return nll_term(logps, lengths, reduction)


@objective("kto", paper="arXiv:2402.01306", family="singles")
def kto(
    logratios: Tensor,  # [N] nats
    labels: Tensor,  # [N] bool, desirable?
    kl_logratios: Tensor,  # [M] nats, mismatched rows
    *,
    beta: Annotated[float, Positive] = 0.1,
    desirable_weight: Annotated[float, NonNegative] = 1.0,
    undesirable_weight: Annotated[float, NonNegative] = 1.0,
) -> Tensor:  # [N]
    """Desirable: w·σ(-β·(x - z0)); undesirable: w·σ(-β·(z0 - x)).

    z0 = max(0, mean(kl_logratios)) without gradient, 0 if there are none.
    """
    z = beta * (logratios - mean_or_zero(kl_logratios).clamp(min=0))
    good, bad = desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z)
    return torch.where(labels.bool(), good, bad)


@objective(
    "kto_apo_zero",
    paper="arXiv:2408.06266",
    family="singles",
    aliases=("apo_zero_unpaired",),
)
def kto_apo_zero(
    logratios: Tensor,  # [N] nats
    labels: Tensor,  # [N] bool, desirable?
    *,
    beta: Annotated[float, Positive] = 0.1,
    desirable_weight: Annotated[float, NonNegative] = 1.0,
    undesirable_weight: Annotated[float, NonNegative] = 1.0,
) -> Tensor:  # [N]
    """Desirable: w·σ(-β·x); undesirable: w·σ(β·x)."""
    z = beta * logratios
    good, bad = desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z)
    return torch.where(labels.bool(), good, bad)
