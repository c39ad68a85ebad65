"""Pairs, token level: objectives that read every scored position. All return [B].

`l_t` is the log-ratio of a token, log pi - log ref, in nats; `Σ_m` sums over scored positions. A
side without any counts as 0.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import EXP_CAP, exp_cap, masked_mean, masked_sum
from ._parameters import NonNegative, OneOf, Positive, Unit
from ._registry import objective
from .pairs import dpo
from .transforms import ld_logps, wpo_weights

_TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")


@objective("ld_dpo", paper="arXiv:2409.06411")
def ld_dpo(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    ref_chosen_token_logps: Tensor,  # [B, T] nats
    ref_rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    *,
    beta: Annotated[float, Positive] = 0.1,
    ld_alpha: Annotated[float, Unit] = 0.5,
) -> Tensor:  # [B] nats
    """dpo, tokens beyond the length of the shorter side weighted by ld_alpha."""
    masks = (chosen_mask, rejected_mask)
    pi = ld_logps(chosen_token_logps, rejected_token_logps, *masks, ld_alpha=ld_alpha)
    ref = ld_logps(ref_chosen_token_logps, ref_rejected_token_logps, *masks, ld_alpha=ld_alpha)
    chosen, rejected = (pi[name] - ref[name] for name in ("chosen_logps", "rejected_logps"))
    return dpo(chosen, rejected, beta=beta)


@objective("wpo", paper="arXiv:2406.11827")
def wpo(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    ref_chosen_token_logps: Tensor,  # [B, T] nats
    ref_rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    chosen_log_sum_sq_probs: Tensor | None = None,  # [B, T] nats
    rejected_log_sum_sq_probs: Tensor | None = None,  # [B, T] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats
    """dpo times the transform wpo_weights, which carry no gradient."""
    weights = wpo_weights(
        chosen_token_logps,
        rejected_token_logps,
        chosen_mask,
        rejected_mask,
        chosen_log_sum_sq_probs,
        rejected_log_sum_sq_probs,
    )
    chosen = masked_sum(chosen_token_logps - ref_chosen_token_logps, chosen_mask)
    rejected = masked_sum(rejected_token_logps - ref_rejected_token_logps, rejected_mask)
    return dpo(chosen, rejected, pair_weights=weights["pair_weights"], beta=beta)


@objective(
    "mask_dpo",
    paper="arXiv:2503.02846",
    aliases=("token_weighted_dpo",),
    gradient_into=_TOKEN_WEIGHTS,
)
def mask_dpo(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    ref_chosen_token_logps: Tensor,  # [B, T] nats
    ref_rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    chosen_token_weights: Tensor,  # [B, T] 0, 1 or any number
    rejected_token_weights: Tensor,  # [B, T]
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats
    """-log σ(β·[Σ_m w_t·l_t of chosen - Σ_m w_t·l_t of rejected]); gradient into the weights."""
    chosen = chosen_token_weights * (chosen_token_logps - ref_chosen_token_logps)
    rejected = rejected_token_weights * (rejected_token_logps - ref_rejected_token_logps)
    return dpo(masked_sum(chosen, chosen_mask), masked_sum(rejected, rejected_mask), beta=beta)


@objective("dpo_bmc", paper="arXiv:2408.07471")
def dpo_bmc(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    ref_chosen_token_logps: Tensor,  # [B, T] nats
    ref_rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    chosen_token_weights: Tensor,  # [B, T] 1 where the two responses differ
    rejected_token_weights: Tensor,  # [B, T]
    *,
    beta: Annotated[float, Positive] = 0.01,
    delta: Annotated[float, Positive] = 2.0,
    ref_weighting: Annotated[str, OneOf("policy", "own")] = "policy",
) -> Tensor:  # [B] nats
    """-log σ(β·[Σ_m m_t·l_t of chosen - Σ_m m_t·l_t of rejected]), m_t = 1 + d_t·min(1/p_t, δ).

    d_t are the token weights; m_t carries no gradient. ref_weighting "own" (released code): the
    reference's log-probabilities are weighted by its own 1/p.
    """

    cap = min(math.log(delta), EXP_CAP)

    def side(logps: Tensor, ref: Tensor, differs: Tensor, mask: Tensor) -> Tensor:
        def weighted(x: Tensor, model: Tensor) -> Tensor:
            return (1 + differs * exp_cap(-model.detach(), cap)) * x

        judge = logps if ref_weighting == "policy" else ref
        return masked_sum(weighted(logps, logps) - weighted(ref, judge), mask)

    chosen = side(chosen_token_logps, ref_chosen_token_logps, chosen_token_weights, chosen_mask)
    rejected = side(
        rejected_token_logps, ref_rejected_token_logps, rejected_token_weights, rejected_mask
    )
    return dpo(chosen, rejected, beta=beta)


@objective("rrpo", paper="arXiv:2504.12083")
def rrpo(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    ref_chosen_token_logps: Tensor,  # [B, T] nats
    ref_rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    chosen_segments: Tensor,  # [B, T] int64, edited phrase or -1
    rejected_segments: Tensor,  # [B, T] int64
    chosen_token_kl: Tensor,  # [B, T] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, NonNegative] = 0.01,
) -> Tensor:  # [B] nats
    """dpo over the tokens of edited phrases (segment ≥ 0), plus α·Σ_m chosen_token_kl."""
    chosen = chosen_token_logps - ref_chosen_token_logps
    rejected = rejected_token_logps - ref_rejected_token_logps
    rows = dpo(
        masked_sum(chosen, chosen_mask & (chosen_segments >= 0)),
        masked_sum(rejected, rejected_mask & (rejected_segments >= 0)),
        beta=beta,
    )
    return rows + alpha * masked_sum(chosen_token_kl, chosen_mask)


@objective("opa_dpo", paper="arXiv:2501.09695")
def opa_dpo(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    ref_chosen_token_logps: Tensor,  # [B, T] nats
    ref_rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    chosen_token_weights: Tensor | None = None,  # [B, T], 1 without
    rejected_token_weights: Tensor | None = None,  # [B, T]
    *,
    beta: Annotated[float, Positive] = 0.1,
    level: Annotated[str, OneOf("token", "sequence")] = "token",
) -> Tensor:  # [B] nats
    """token: -log σ(β·(c_t·l_t chosen - d_t·l_t rejected)), c and d the token weights.

    Mean over the positions scored on both sides, 0 if there are none. sequence: mask_dpo.
    """
    chosen = chosen_token_logps - ref_chosen_token_logps
    rejected = rejected_token_logps - ref_rejected_token_logps
    if chosen_token_weights is not None:
        chosen = chosen_token_weights * chosen
    if rejected_token_weights is not None:
        rejected = rejected_token_weights * rejected
    if level == "sequence":
        return dpo(masked_sum(chosen, chosen_mask), masked_sum(rejected, rejected_mask), beta=beta)
    return masked_mean(-F.logsigmoid(beta * (chosen - rejected)), chosen_mask & rejected_mask)


@objective("pairwise_cringe", paper="arXiv:2312.16682")
def pairwise_cringe(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    rejected_alternative_token_logps: Tensor,  # [B, T] nats, drawn among the policy's top k
    rejected_mask: Tensor,  # [B, T] bool
    *,
    alpha: Annotated[float, NonNegative] = 0.005,
    bias: float = -10.0,
    tau: Annotated[float, Positive] = 10.0,
    detach_gate: bool = False,
) -> Tensor:  # [B] nats
    """gate·[-c + α·Σ_m -log σ(alternative_t - logp_t)], gate = σ((bias - (c - r))/τ).

    The gate closes on pairs won by more than the bias; detach_gate stops its gradient.
    """
    gate = torch.sigmoid((bias - (chosen_logps - rejected_logps)) / tau)
    if detach_gate:
        gate = gate.detach()
    contrast = -F.logsigmoid(rejected_alternative_token_logps - rejected_token_logps)
    return gate * (-chosen_logps + alpha * masked_sum(contrast, rejected_mask))
