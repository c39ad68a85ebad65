"""Policy gradient with a weight in place of the clip, and plain score functions. All return [N].

Family "policy_gradient". `w` and the terms that is_weights, beta, unbiased_kl and entropy_coef ask
for are those of `policy_gradient`.
"""

import math
from functools import partial
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from ._math import REDUCTIONS, exp_cap, masked_mean, masked_sum
from ._parameters import Interval, NonNegative, OneOf, Positive
from ._policy import (
    Batch,
    Coefficient,
    Level,
    NumTokens,
    Penalties,
    either,
    log_ratios,
    per_token,
    token_mean,
)
from ._registry import objective

_LOG_BOUND = 20.0  # VESPO's and TRL's bounds of a log-ratio, above and
_SMALLEST = 1e-8  # of a ratio, below
Lambda = Annotated[float, Interval(1e-4, math.inf, "[)")]


@objective("cispo", paper="arXiv:2506.13585", family="policy_gradient")
def cispo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    min_ratio: Annotated[float, NonNegative] = 0.0,
    max_ratio: Annotated[float, NonNegative] = 5.0,
    num_tokens: NumTokens = None,
    level: Level = "token",
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """Mean over all scored tokens of -sg(clamp(w, min_ratio, max_ratio))·A·logp.

    max_ratio is the paper's 1 + ε_high; 5 is ScaleRL's and TRL's ε_max. num_tokens as in dapo.
    """
    if min_ratio > max_ratio:
        raise ValueError(f"min_ratio: expected at most max_ratio = {max_ratio}, got {min_ratio}")
    batch = Batch(
        token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, is_weights
    )

    def term(ratio: Tensor, advantages: Tensor) -> Tensor:
        return -ratio.detach().clamp(min_ratio, max_ratio) * advantages * token_logps

    reduce = partial(token_mean, num_tokens=num_tokens)
    return batch.rows(term, reduce, level, Penalties(beta, unbiased_kl, entropy_coef))


@objective("sapo", paper="arXiv:2511.20347", family="policy_gradient")
def sapo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    temperature_pos: Annotated[float, Positive] = 1.0,
    temperature_neg: Annotated[float, Positive] = 1.05,
    level: Level = "token",
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """Mean over the row of -(4/τ)·σ(τ·(w - 1))·A, τ by the sign of A (0 is negative)."""
    batch = Batch(
        token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, is_weights
    )

    def term(ratio: Tensor, advantages: Tensor) -> Tensor:
        tau = either(advantages > 0, temperature_pos, temperature_neg, advantages)
        # The slope of torch.sigmoid near 1 is rounding, and a large ratio multiplies it.
        gate = F.logsigmoid(tau * (ratio - 1)).exp()
        return -4 / tau * gate * advantages

    return batch.rows(term, masked_mean, level, Penalties(beta, unbiased_kl, entropy_coef))


@objective("vespo", paper="arXiv:2602.10693", family="policy_gradient")
def vespo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    k_pos: Annotated[float, NonNegative] = 2.0,
    lambda_pos: Lambda = 3.0,
    k_neg: Annotated[float, NonNegative] = 3.0,
    lambda_neg: Lambda = 2.0,
    num_tokens: NumTokens = None,
    beta: Coefficient = 0.0,
    unbiased_kl: bool = False,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """Mean over all scored tokens of -φ·A·logp, φ = sg(exp(λ + k·ω - λ·e^ω)).

    ω is the log-ratio of the row: Σ_t clamp(x_t, ±20) + Σ_t clamp(log is_weights_t, log 1e-8, 20),
    clamped into [log 1e-8, 20]; is_weights [N, 1] count once and are no factor. A weight of 0 is a
    mask's: a factor 0 of the token's term, and nothing in ω (TRL: so for its entropy and off-policy
    masks; its sampler's token_mask adds log 1e-8). k, λ by the sign of A (0 is positive). The KL
    term has the token's ratio; num_tokens as in dapo.
    """
    kept = None if is_weights is None else is_weights != 0
    batch = Batch(token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy, kept)
    omega = _row_log_ratio(log_ratios(token_logps, old_token_logps).detach(), mask, is_weights)

    def term(_: Tensor, advantages: Tensor) -> Tensor:
        k = either(advantages >= 0, k_pos, k_neg, advantages)
        lam = either(advantages >= 0, lambda_pos, lambda_neg, advantages)
        phi = exp_cap(k * omega - lam * omega.expm1())
        return -phi * advantages * token_logps

    reduce = partial(token_mean, num_tokens=num_tokens)
    return batch.rows(term, reduce, "token", Penalties(beta, unbiased_kl, entropy_coef))


def _row_log_ratio(x: Tensor, mask: Tensor, is_weights: Tensor | None) -> Tensor:
    """[N, 1] log of pi over the sampler for the whole row, bounded per token and as a sum.

    A weight of 0 is no ratio: one masked token would drown all others in log 1e-8.
    """
    total = masked_sum(x.clamp(-_LOG_BOUND, _LOG_BOUND), mask)[:, None]
    if is_weights is not None:
        ratios = is_weights.masked_fill(is_weights == 0, 1)
        # Clamped before the log, which has NaN below 0.
        log_weights = ratios.clamp(_SMALLEST, math.exp(_LOG_BOUND)).log()
        per_position = is_weights.shape == mask.shape
        total = total + (masked_sum(log_weights, mask)[:, None] if per_position else log_weights)
    return total.clamp(math.log(_SMALLEST), _LOG_BOUND)


@objective("reinforce", family="policy_gradient")
def reinforce(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    is_weights: Tensor | None = None,  # [N, T] or [N, 1]
    *,
    reduction: Annotated[str, OneOf(*REDUCTIONS)] = "sum",
    num_tokens: NumTokens = None,
) -> Tensor:  # [N]
    """-A·logp_t·is_weights_t: the score-function term for any coefficient.

    "sum" or "mean" over the row; "batch": mean over all scored tokens, num_tokens as in dapo.
    """
    tokens = -per_token(advantages) * token_logps
    if is_weights is not None:
        tokens = tokens * is_weights
    if reduction == "batch":
        return token_mean(tokens, mask, num_tokens)
    return masked_mean(tokens, mask) if reduction == "mean" else masked_sum(tokens, mask)


@objective("nash_md", paper="arXiv:2312.00886", family="policy_gradient")
def nash_md(
    token_logps: Tensor,  # [N, T] nats
    ref_token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    scores: Tensor,  # [N] P(y beats a sample of the mixture of policy and reference)
    *,
    beta: Coefficient = 0.1,
    level: Annotated[str, OneOf("sequence", "token")] = "sequence",
) -> Tensor:  # [N]
    """-(scores - ½)·Σ_m logp + β·KL; l_t = logp_t - ref_t.

    KL, as a score function: "sequence" (paper) sg(Σ_m l)·Σ_m logp, "token" (TRL) Σ_m sg(l)·logp.
    """
    drift = (token_logps - ref_token_logps).detach()
    logps = masked_sum(token_logps, mask)
    if level == "sequence":
        kl = masked_sum(drift, mask) * logps
    else:
        kl = masked_sum(drift * token_logps, mask)
    return beta * kl - (scores - 0.5) * logps
