"""Groups, ranked: objectives over the pairs or the ranking by score. All return [G].

Per member k: `h_k = β·logratio_k`, `ŝ_k = logp_k / max(n_k, 1)`, score S_k (higher is better). A
ranking is by falling score, equal scores in row order; an empty group gives 0. The formulas run
over pairs of a group, and so do these: [N, N] comparisons, time and memory N² whatever the number
of groups, for the largest group could only be known by reading it on the host.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import (
    avg,
    exp_cap,
    group_count,
    group_logsumexp,
    group_max,
    group_sizes,
    group_sum,
    k3,
    marked,
    masked_mean,
    masked_sum,
    plackett_luce,
    softplus,
)
from ._parameters import NonNegative, NumGroups, OneOf, Positive
from ._registry import objective


def _better(scores: Tensor, groups: Tensor) -> Tensor:
    """[i, j] bool: i and j are of one group and S_i > S_j."""
    return (scores[:, None] > scores[None, :]) & (groups[:, None] == groups[None, :])


def _ahead(scores: Tensor, groups: Tensor) -> Tensor:
    """[i, j] bool: i and j are of one group and i ranks before j."""
    row = torch.arange(len(scores), dtype=torch.int64, device=scores.device)
    tied = (scores[:, None] == scores[None, :]) & (groups[:, None] == groups[None, :])
    return _better(scores, groups) | (tied & (row[:, None] < row[None, :]))


def _gaps(x: Tensor, better: Tensor) -> Tensor:
    """[i, j] x_j - x_i of the pairs alone: times 0 the NaN of another group would be one here."""
    return torch.where(better, x[None, :] - x[:, None], 0)


def _of_first(x: Tensor, ahead: Tensor, groups: Tensor, count: int) -> Tensor:
    """[N] -> [G] x of the row that ranks first; 0 for an empty group."""
    return group_sum(torch.where(ahead.any(0), 0, x), groups, count)


@objective("dpo_plackett_luce", paper="arXiv:2305.18290", family="groups")
def dpo_plackett_luce(
    logratios: Tensor,  # [N] nats
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    beta: Annotated[float, Positive] = 0.1,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """Σ_k [log Σ_{j ranked k or later} e^{h_j} - h_k], h = β·logratio."""
    count, wrong = group_count(groups, num_groups, scores)
    return marked(plackett_luce(beta * logratios, scores, groups, count), wrong)


@objective("pro_ranking", paper="arXiv:2306.17492", family="groups")
def pro_ranking(
    logps: Tensor,  # [N] nats
    lengths: Tensor,  # [N] int64
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    sft_weight: Annotated[float, NonNegative] = 0.05,
    num_groups: NumGroups = None,
) -> Tensor:  # [G]
    """Σ_{k<K} [log(e^{ŝ_k·T_kk} + Σ_{i>k} e^{ŝ_i·T_ki}) - ŝ_k·T_kk] + sft·(K-1)²·(-logp_1).

    k and i in rank order, T_ki = S_k - S_i, T_kk = max_{i>k} T_ki; logp_1 is the best row's sum.
    One row: 0.
    """
    count, wrong = group_count(groups, num_groups, scores)
    ahead = _ahead(scores, groups)
    mean = avg(logps, lengths)
    lowest = -group_max(-scores, groups, count)  # it gives T_kk, and 0 for the last in rank
    own = mean * (scores - lowest[groups])
    other = mean[None, :] * -_gaps(scores, ahead)
    gap = torch.where(ahead, other - own[:, None], -math.inf)
    # Not logsumexp: its gradient takes the exponential of a difference of larger numbers.
    contrast = group_sum(-F.pad(gap, (1, 0)).log_softmax(1)[:, 0], groups, count)
    rounds = (group_sizes(groups, count) - 1).to(logps.dtype).square()
    rows = contrast - sft_weight * rounds * _of_first(logps, ahead, groups, count)
    return marked(rows, wrong)


@objective("aft", paper="arXiv:2309.02144", family="groups")
def aft(
    logps: Tensor,  # [N] nats
    lengths: Tensor,  # [N] int64
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    variant: Annotated[str, OneOf("boundary", "plain", "detached")] = "boundary",
    beta: Annotated[float, NonNegative] = 0.1,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """log(1 + Σ_{S_i > S_j} [e^{ŝ_j - ŝ_i} + e^{T_j - ŝ_j}]) + mean of -ŝ over the top score.

    T_j = min_{i: S_i > S_j} ŝ_i - 2·β without gradient: the pull back up stops the push down β
    below the better row, a little higher if there are several. plain: without the T terms;
    detached: plain, ŝ_j without gradient. Scores 1/0 give the binary form, graded ones the ranking
    form. No pair: the last term.
    """
    count, wrong = group_count(groups, num_groups, scores)
    better = _better(scores, groups)
    mean = avg(logps, lengths)
    pushed = mean.detach() if variant == "detached" else mean
    terms = torch.where(better, pushed[None, :] - mean[:, None], -math.inf)
    pull = torch.full_like(mean, -math.inf)
    if variant == "boundary":
        above = torch.where(better, mean.detach()[:, None], math.inf)
        # A row that bounds nothing, for no rows at all; torch 2.8 pads no empty matrix.
        weakest = torch.cat([above, above.new_full((1, len(mean)), math.inf)]).amin(0)
        pairs = better.sum(0)  # each pair of j adds the same term
        bound = weakest - 2 * beta + pairs.clamp(min=1).to(mean.dtype).log()
        pull = torch.where(pairs > 0, bound - mean, -math.inf)
    terms = torch.cat([terms, pull[:, None]], 1)
    top = scores == group_max(scores, groups, count)[groups]
    best = group_sum(torch.where(top, mean, 0), groups, count)
    winners = group_sum(top.to(mean.dtype), groups, count).clamp(min=1)
    return marked(softplus(group_logsumexp(terms, groups, count)) - best / winners, wrong)


@objective("knowpat", paper="arXiv:2311.06503", family="groups")
def knowpat(
    logps: Tensor,  # [N] nats
    lengths: Tensor,  # [N] int64
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    lam: Annotated[float, NonNegative] = 0.01,
    length_power: Annotated[float, NonNegative] = 1.0,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """lam/(K-1)·Σ_{k<K} w_k·[-log σ(s_k) + mean_{j>k}(-log σ(-s_j))] - ŝ_1.

    k and j in rank order, s_k = logp_k / max(n_k, 1)^length_power, w_k = (s_k - min s)/(max s -
    min s) without gradient, 0 if all s are equal. One row: only -ŝ_1.
    """
    count, wrong = group_count(groups, num_groups, scores)
    ahead = _ahead(scores, groups)
    s = avg(logps, lengths, length_power)
    low, high = -group_max(-s, groups, count)[groups], group_max(s, groups, count)[groups]
    weight = (s.detach() - low) / torch.where(high > low, high - low, 1)
    behind = ahead.sum(1).to(s.dtype)
    rest = torch.where(ahead, softplus(s)[None, :], 0).sum(1) / behind.clamp(min=1)
    terms = torch.where(behind > 0, weight * (softplus(-s) + rest), 0)
    rounds = (group_sizes(groups, count) - 1).clamp(min=1).to(s.dtype)
    best = _of_first(avg(logps, lengths), ahead, groups, count)
    return marked(lam * group_sum(terms, groups, count) / rounds - best, wrong)


@objective("trpa", paper="arXiv:2504.04524", family="groups")
def trpa(
    token_logps: Tensor,  # [N, T] nats
    old_token_logps: Tensor,  # [N, T] nats
    ref_token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    beta: Annotated[float, Positive] = 0.1,
    top_score: float = 1.0,
    top_factor: Annotated[float, NonNegative] = 2.5,
    kl_coef: Annotated[float, NonNegative] = 0.001,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """mean_{S_i > S_j} -log σ(f_i·β·(ρ_i - ρ_j)) + kl_coef·mean_t k3(old - logp).

    ρ = mean over scored tokens of logp - ref; f_i = top_factor if S_i ≥ top_score, else 1. Both are
    means over the batch, all pairs and all scored tokens: a group's row has its own sums over the
    batch's counts, times G. No pair in the batch: only the KL.
    """
    count, wrong = group_count(groups, num_groups, scores)
    better = _better(scores, groups)
    drift = masked_mean(token_logps - ref_token_logps, mask)
    factor = torch.where(scores >= top_score, top_factor * beta, torch.full_like(drift, beta))
    losses = softplus(factor[:, None] * _gaps(drift, better))
    ranking = group_sum(torch.where(better, losses, 0).sum(1), groups, count)
    kl = group_sum(masked_sum(k3(old_token_logps - token_logps), mask), groups, count)
    pairs, tokens = (chosen.sum().clamp(min=1).to(kl.dtype) for chosen in (better, mask))
    return marked(count * (ranking / pairs + kl_coef * kl / tokens), wrong)


@objective(
    "lambda_rank",
    paper="arXiv:2410.12854",
    family="groups",
    aliases=("tpo_tree", "rank_dpo"),
)
def lambda_rank(
    logratios: Tensor,  # [N] nats
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    beta: Annotated[float, Positive] = 0.5,
    rank_by: Annotated[str, OneOf("scores", "model")] = "scores",
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """Σ_{S_i > S_j} |2^{S_i} - 2^{S_j}|·|1/ln(1+rank_i) - 1/ln(1+rank_j)|·(-log σ(h_i - h_j)).

    h = β·logratio. Ranks count from 1, by score, or by the model's log-ratio without gradient
    (LiPO-λ, arXiv:2402.01878); RankDPO is this by score on denoising errors. 2^S stops growing at
    e^40; scores are meant to be grades or lie in [0, 1].
    """
    count, wrong = group_count(groups, num_groups, scores)
    ranked = scores if rank_by == "scores" else logratios
    rank = 1 + _ahead(ranked, groups).sum(0)
    discount = (1 + rank).to(logratios.dtype).log().reciprocal()
    # 2^a - 2^b = 2^a·(1 - 2^(b-a)), so that two scores beyond the cap still differ
    power = exp_cap(math.log(2) * scores)[:, None]
    gain = -power * (math.log(2) * (scores[None, :] - scores[:, None])).expm1()
    weight = gain * (discount[:, None] - discount[None, :]).abs()
    h, better = beta * logratios, _better(scores, groups)
    pairs = torch.where(better, weight, 0) * softplus(_gaps(h, better))
    return marked(group_sum(pairs.sum(1), groups, count), wrong)
