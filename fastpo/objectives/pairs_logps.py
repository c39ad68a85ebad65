"""Pairs, without a reference: objectives of log-probabilities. Family "pairs", see pairs.py.

`c, r` are the chosen and rejected log-probabilities, `ĉ, r̂` their averages per token. All return
[B].
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from ._math import REDUCTIONS, avg, cut, log1mexp, logistic, nll_term
from ._registry import NonNegative, OneOf, Positive, Unit, objective


@objective("sft", family="pairs")
def sft(
    chosen_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    *,
    reduction: Annotated[str, OneOf(*REDUCTIONS)] = "batch",
) -> Tensor:  # [B] nats
    """NLL(chosen_logps, chosen_lengths; reduction); "batch" averages to the token mean."""
    return nll_term(chosen_logps, chosen_lengths, reduction)


@objective("cpo", paper="arXiv:2401.08417", family="pairs")
def cpo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 0.1,
    cpo_alpha: Annotated[float, NonNegative] = 1.0,
    label_smoothing: Annotated[float, Unit] = 0.0,
    sft_reduction: Annotated[str, OneOf(*REDUCTIONS)] = "mean",
) -> Tensor:  # [B] nats
    """L(β·(c - r); 1 - ε) + cpo_alpha·NLL(chosen_logps, chosen_lengths; sft_reduction)."""
    rows = logistic(beta * (chosen_logps - rejected_logps), 1 - label_smoothing)
    return rows + cpo_alpha * nll_term(chosen_logps, chosen_lengths, sft_reduction)


@objective("simpo", paper="arXiv:2405.14734", family="pairs")
def simpo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 2.0,
    gamma: float = 1.0,
    label_smoothing: Annotated[float, Unit] = 0.0,
) -> Tensor:  # [B] nats
    """L(β·(ĉ - r̂) - γ; 1 - ε). γ is in units of the logit: TRL's simpo_gamma."""
    gap = avg(chosen_logps, chosen_lengths) - avg(rejected_logps, rejected_lengths)
    return logistic(beta * gap - gamma, 1 - label_smoothing)


@objective("orpo", paper="arXiv:2403.07691", family="pairs")
def orpo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats
    """-ĉ - β·log σ(odds(ĉ) - odds(r̂)), odds(x) = x - log(1 - e^x) with x cut at -1e-6.

    The NLL covers the chosen completion (paper); TRL's covers the prompt too.
    """
    chosen = avg(chosen_logps, chosen_lengths)
    c, r = cut(chosen), cut(avg(rejected_logps, rejected_lengths))
    log_odds = (c - log1mexp(c)) - (r - log1mexp(r))
    return -chosen - beta * F.logsigmoid(log_odds)
