"""Quantities in, quantities out: what `compose` puts in front of an objective."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ties import lowest, reaches
from ._math import (
    EXP_CAP,
    avg,
    exp_cap,
    expm1_cap,
    group_center,
    group_count,
    group_sum,
    marked,
    masked_mean,
    masked_sum,
)
from ._parameters import NonNegative, NumGroups, OneOf, Positive, Unit
from ._registry import transform

# Objectives of Δ alone: there the partition function cancels.
_DIFFERENCE_ONLY = frozenset(
    {"dpo", "dpo_norm", "robust_dpo", "hinge", "ipo", "ipo_norm"}
    | {"exo_pair", "discopop", "odpo", "dpo_sft", "sft"}
)
Quantities = dict[str, Tensor]


def _f_prime(x: Tensor, divergence: str, alpha: float) -> Tensor:
    if divergence == "reverse_kl" or (divergence == "alpha" and abs(alpha) < 1e-6):
        return x
    if divergence == "js":
        return math.log(2) + F.logsigmoid(x)
    power = alpha if divergence == "alpha" else 1.0  # alpha 1 is the forward KL
    return -expm1_cap(-power * x) / power


@transform(
    "f_divergence",
    paper="arXiv:2309.16240",
    outputs=("chosen_logratios", "rejected_logratios"),
    before=_DIFFERENCE_ONLY,
)
def f_divergence(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    divergence: Annotated[str, OneOf("reverse_kl", "forward_kl", "js", "alpha")] = "reverse_kl",
    alpha: float = 0.5,
) -> Quantities:
    """Scores s(x) = f'(e^x) in place of the log-ratios.

    reverse_kl: x. forward_kl: 1 - exp⁺(-x). js: log 2 + log σ(x). alpha: (1 - exp⁺(-α·x))/α, the
    paper's α; TRL's coefficient is 1 - α.
    """
    return {
        "chosen_logratios": _f_prime(chosen_logratios, divergence, alpha),
        "rejected_logratios": _f_prime(rejected_logratios, divergence, alpha),
    }


@transform(
    "length_normalize",
    paper="arXiv:2407.15229",
    outputs=("chosen_logratios", "rejected_logratios"),
)
def length_normalize(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    *,
    power: Annotated[float, NonNegative] = 1.0,
) -> Quantities:
    """x / max(n, 1)^power on both sides (LN-DPO, SimPO)."""
    return {
        "chosen_logratios": avg(chosen_logratios, chosen_lengths, power),
        "rejected_logratios": avg(rejected_logratios, rejected_lengths, power),
    }


@transform(
    "ld_logps",
    paper="arXiv:2409.06411",
    outputs=("chosen_logps", "rejected_logps"),
    mirrored=True,
)
def ld_logps(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    *,
    ld_alpha: Annotated[float, Unit] = 0.5,
) -> Quantities:
    """Σ of the first m scored tokens + ld_alpha · Σ of the rest, m = length of the shorter side."""
    shared = torch.minimum(chosen_mask.sum(-1), rejected_mask.sum(-1))[:, None]

    def side(token_logps: Tensor, mask: Tensor) -> Tensor:
        tail = mask.cumsum(-1) > shared
        return masked_sum(torch.where(tail, ld_alpha * token_logps, token_logps), mask)

    return {
        "chosen_logps": side(chosen_token_logps, chosen_mask),
        "rejected_logps": side(rejected_token_logps, rejected_mask),
    }


@transform("wpo_weights", paper="arXiv:2406.11827", outputs=("pair_weights",))
def wpo_weights(
    chosen_token_logps: Tensor,  # [B, T] nats
    rejected_token_logps: Tensor,  # [B, T] nats
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    chosen_log_sum_sq_probs: Tensor | None = None,  # [B, T] nats
    rejected_log_sum_sq_probs: Tensor | None = None,  # [B, T] nats
) -> Quantities:
    """min(w_chosen·w_rejected, e^40), w = exp⁺(mean over tokens of logp - log Σ_v p²), no gradient.

    Without log_sum_sq_probs the weights are not aligned; an empty side weighs 1.
    """

    def side(token_logps: Tensor, mask: Tensor, log_sum_sq: Tensor | None) -> Tensor:
        aligned = token_logps if log_sum_sq is None else token_logps - log_sum_sq
        return exp_cap(masked_mean(aligned.detach(), mask))

    chosen = side(chosen_token_logps, chosen_mask, chosen_log_sum_sq_probs)
    rejected = side(rejected_token_logps, rejected_mask, rejected_log_sum_sq_probs)
    return {"pair_weights": (chosen * rejected).clamp(max=math.exp(EXP_CAP))}


@transform("score_labels", paper="arXiv:2410.03145", outputs=("soft_labels",))
def score_labels(
    chosen_scores: Tensor,  # [B]
    rejected_scores: Tensor,  # [B]
    *,
    scale: Annotated[float, NonNegative] = 1.0,
) -> Quantities:
    """soft_labels = σ(scale·(s_w - s_l)) (MMPO, DNO)."""
    return {"soft_labels": torch.sigmoid(scale * (chosen_scores - rejected_scores))}


@transform(
    "denoising_logratios",
    paper="arXiv:2311.12908",
    outputs=("chosen_logratios", "rejected_logratios"),
)
def denoising_logratios(
    chosen_errors: Tensor,  # [B] squared errors
    rejected_errors: Tensor,  # [B]
    ref_chosen_errors: Tensor,  # [B]
    ref_rejected_errors: Tensor,  # [B]
    timestep_weights: Tensor | None = None,  # [B]
    *,
    scale: Annotated[float, Positive] = 1.0,
) -> Quantities:
    """log-ratio := -scale·w·(error - ref_error): pairs objectives for diffusion and flow."""
    factor = -scale if timestep_weights is None else -scale * timestep_weights
    return {
        "chosen_logratios": factor * (chosen_errors - ref_chosen_errors),
        "rejected_logratios": factor * (rejected_errors - ref_rejected_errors),
    }


@transform("group_advantages", paper="arXiv:2402.03300, arXiv:2503.20783", outputs=("advantages",))
def group_advantages(
    scores: Tensor,  # [N]
    groups: Tensor,  # [N] int64, sorted
    *,
    scale: Annotated[str, OneOf("group", "batch", "none")] = "group",
    eps: Annotated[float, NonNegative] = 0.0001,
    num_groups: NumGroups = None,
) -> Quantities:
    """A = s - group mean, over std + eps of the group, of the batch, or of nothing.

    std has n - 1 in the denominator; for one row it is 0. Equal scores: A = 0. A score that is NaN
    (no reward) has A = 0 and counts in no mean and no std.
    """
    known = ~scores.isnan()
    count, wrong = group_count(groups, num_groups)
    advantages = marked(group_center(scores, groups, count, known), wrong)
    if scale == "group":
        squares = group_sum(advantages.square(), groups, count)
        sizes = group_sum(known.to(scores.dtype), groups, count)
        std = (squares / (sizes - 1).clamp(min=1)).sqrt()[groups]
    elif scale == "batch":
        size = known.sum()
        deviation = torch.where(known, scores - scores.nansum() / size.clamp(min=1), 0)
        std = (deviation.square().sum() / (size - 1).clamp(min=1)).sqrt()
    else:
        return {"advantages": advantages}
    spread = std + eps  # 0 when eps is and all scores are equal; then A is 0 as well
    return {"advantages": advantages / torch.where(spread > 0, spread, 1.0)}


@transform("rloo_advantages", paper="arXiv:2402.14740", outputs=("advantages",))
def rloo_advantages(
    scores: Tensor,  # [N]
    groups: Tensor,  # [N] int64, sorted
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    mask: Tensor | None = None,  # [N, T] bool
    *,
    beta: float = 0.0,
    num_groups: NumGroups = None,
) -> Quantities:
    """r = s - beta·Σ_t (old - ref); A = r - mean of the other rows of the group, 0 if alone.

    A score that is NaN (no reward) has A = 0 and is no other row.
    """
    rewards = scores
    if beta != 0:
        if old_token_logps is None or ref_token_logps is None or mask is None:
            raise ValueError(
                "old_token_logps, ref_token_logps, mask: expected all three with beta != 0, "
                f"got beta {beta} without them"
            )
        rewards = scores - beta * masked_sum(old_token_logps - ref_token_logps, mask)
    known = ~scores.isnan()
    count, wrong = group_count(groups, num_groups)
    sizes = group_sum(known.to(scores.dtype), groups, count)[groups]
    # r_i - (Σ_j r_j - r_i)/(n - 1) = (r_i - mean)·n/(n - 1)
    centered = group_center(rewards, groups, count, known)
    return {"advantages": marked(centered * sizes / (sizes - 1).clamp(min=1), wrong)}


@transform("lsc_scores", paper="arXiv:2402.00742", outputs=("scores",))
def lsc_scores(
    objective_scores: Tensor,  # [N, M]
    reference_scores: Tensor,  # [N, M]
) -> Quantities:
    """scores = Σ_k log σ(objective_scores_k - reference_scores_k)."""
    return {"scores": F.logsigmoid(objective_scores - reference_scores).sum(-1)}


def _above_sampler(token_logps: Tensor, sampler_token_logps: Tensor) -> Tensor:
    """logp - sampler; 0 where the sampler's is NaN, as engines mark what they do not know."""
    difference = token_logps - sampler_token_logps
    return difference.masked_fill(sampler_token_logps.isnan(), 0)


@transform("off_policy_mask", paper="arXiv:2512.02556", outputs=("is_weights",))
def off_policy_mask(
    token_logps: Tensor,  # [N, T] nats
    sampler_token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N] or [N, T]
    *,
    threshold: float = 0.5,
) -> Quantities:
    """1 where A ≥ 0 or the mean of sampler - logp over the row is at most threshold, else 0.

    A sampler's log-probability that is NaN (not known) counts as equal to the policy's.
    """
    drift = masked_mean(-_above_sampler(token_logps, sampler_token_logps), mask)[:, None]
    per_row = advantages if advantages.ndim == 2 else advantages[:, None]
    return {"is_weights": ((per_row >= 0) | (drift <= threshold)).to(drift.dtype)}


@transform("high_entropy_mask", paper="arXiv:2506.01939", outputs=("is_weights",))
def high_entropy_mask(
    entropy: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    *,
    top: Annotated[float, Unit] = 0.2,
) -> Quantities:
    """1 where scored and entropy ≥ the 1 - top quantile over all scored tokens, else 0.

    Tokens whose entropies differ by rounding alone are on one side, above; one that is NaN is on
    none and has weight NaN. The bonus of an objective's entropy_coef stays that of all scored
    tokens; TRL's is that of the tokens above.
    """
    entropy = entropy.detach()
    if entropy.numel() == 0:
        return {"is_weights": torch.zeros_like(entropy)}
    # torch.quantile stops at 16 million elements, and dropping unscored ones would synchronise.
    ranked = entropy.masked_fill(~mask, math.inf).flatten().sort().values
    last = mask.sum().clamp(min=1) - 1
    position = (1 - top) * last.double()
    low = position.floor().long()
    # take, not []: indexing by a 0-d tensor reads it on the host.
    at_low, at_high = ranked.take(low), ranked.take(torch.minimum(low + 1, last))
    quantile = torch.lerp(at_low, at_high, (position - low).to(entropy.dtype))
    least = lowest(entropy, mask & (entropy >= quantile))
    weights = (mask & reaches(entropy, least)).to(entropy.dtype)
    return {"is_weights": weights.masked_fill(entropy.isnan(), math.nan)}


@transform("sampler_is_weights", outputs=("is_weights",))
def sampler_is_weights(
    old_token_logps: Tensor,  # [N, T] nats
    sampler_token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    *,
    mode: Annotated[
        str, OneOf("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
    ] = "sequence_mask",
    cap: Annotated[float | None, NonNegative] = 3.0,
    floor: Annotated[float | None, NonNegative] = None,
) -> Quantities:
    """w = exp⁺(old - sampler), per token or of the sum over the row, [N, 1].

    "truncate" clamps w into [floor, cap], "mask" makes it 0 outside; None is no bound. A sampler's
    log-probability that is NaN (not known) counts as equal to the old one.
    """
    low = 0.0 if floor is None else floor
    high = math.inf if cap is None else cap
    if low > high:
        raise ValueError(f"floor: expected at most cap = {cap}, got {floor}")
    difference = torch.where(mask, _above_sampler(old_token_logps, sampler_token_logps), 0)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    weights = exp_cap(difference)
    if mode.endswith("truncate"):
        return {"is_weights": weights.clamp(low, high)}
    return {"is_weights": weights.masked_fill((weights < low) | (weights > high), 0)}
