"""Pairs, without a reference: objectives of log-probabilities. Family "pairs", see pairs.py.

`c, r` are the chosen and rejected log-probabilities, `ĉ, r̂` their averages per token. All return
[B].
"""

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import REDUCTIONS, avg, cut, log1mexp, logistic, nll_term
from ._parameters import NonNegative, OneOf, Positive, Unit
from ._registry import objective
from .transforms import f_divergence


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


@objective("alphapo", paper="arXiv:2501.03884", family="pairs")
def alphapo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 2.5,
    gamma: float = 0.25,
    alpha: float = 0.25,
    label_smoothing: Annotated[float, Unit] = 0.0,
) -> Tensor:  # [B] nats
    """L(β·(ρ(ĉ) - ρ(r̂)) - γ; 1 - ε), ρ(x) = (1 - exp⁺(-α·x))/α; α = 0 is simpo."""
    chosen, rejected = avg(chosen_logps, chosen_lengths), avg(rejected_logps, rejected_lengths)
    rewards = f_divergence(chosen, rejected, divergence="alpha", alpha=alpha)
    gap = rewards["chosen_logratios"] - rewards["rejected_logratios"]
    return logistic(beta * gap - gamma, 1 - label_smoothing)


@objective("asft_aligned", paper="arXiv:2409.10571", family="pairs")
def asft_aligned(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    *,
    lam: Annotated[float, NonNegative] = 0.1,
) -> Tensor:  # [B] nats
    """-ĉ + λ·[-ĉ - log(1 - e^r̂)], r̂ cut at -1e-6."""
    chosen, rejected = avg(chosen_logps, chosen_lengths), avg(rejected_logps, rejected_lengths)
    return -chosen + lam * (-chosen - log1mexp(cut(rejected)))


# ρ of (w, r, w̄, r̄): log-probabilities of both responses being valid, and of their not being.
_LOGIC: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "ce": lambda w, r, not_w, not_r: w - not_w,
    "ce_unl": lambda w, r, not_w, not_r: w + not_r - torch.logaddexp(r, not_w + not_r),
    "cpo": lambda w, r, not_w, not_r: w - r,
    "orpo": lambda w, r, not_w, not_r: w + not_r - r - not_w,
    "ccpo": lambda w, r, not_w, not_r: w - not_w - r,
    "cfunl": lambda w, r, not_w, not_r: not_r - not_w - r,
    "uncpo": lambda w, r, not_w, not_r: torch.logaddexp(w + r, not_r) - r - not_w,
    "qfunl": lambda w, r, not_w, not_r: not_r - r,
}


@objective("dpa_logic", paper="arXiv:2412.17696", family="pairs")
def dpa_logic(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    *,
    variant: Annotated[str, OneOf(*_LOGIC)] = "ccpo",
    beta: Annotated[float, Positive] = 1.0,
) -> Tensor:  # [B] nats
    """-log σ(β·ρ), ρ = log of what ought to be true over what ought not.

    With w = ĉ, r = r̂, w̄ = log(1 - e^w), r̄ = log(1 - e^r), all cut at -1e-6:
    ce: w - w̄. ce_unl: w + r̄ - log(e^r + e^(w̄ + r̄)). cpo: w - r. orpo: w + r̄ - r - w̄.
    ccpo: w - w̄ - r. cfunl: r̄ - w̄ - r. uncpo: log(e^(w + r) + e^r̄) - r - w̄. qfunl: r̄ - r.
    """
    w, r = cut(avg(chosen_logps, chosen_lengths)), cut(avg(rejected_logps, rejected_lengths))
    return -F.logsigmoid(beta * _LOGIC[variant](w, r, log1mexp(w), log1mexp(r)))
