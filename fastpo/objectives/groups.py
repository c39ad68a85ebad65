"""Groups: objectives of N scored responses in G groups. All return [G]; an empty group gives 0.

`h_k = β·logratio_k` and S_k (higher is better) belong to member k of the K members of a group.
Here are the objectives of the group as a set, in segment operations; those of its ranking or its
pairs are in `groups_rankings`. `num_groups` may exceed the ids that are present; an id beyond it
and a score that is NaN are errors on a CPU, and undefined on a GPU, where nobody waits to see them.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import (
    group_center,
    group_count,
    group_log_softmax,
    group_logsumexp,
    group_max,
    group_sizes,
    group_sum,
    marked,
    softplus,
    truths,
)
from ._parameters import NonNegative, NumGroups, OneOf, Positive
from ._registry import objective

_FAR = 1e30  # within float32, and with room for sums; 0 times its negative is 0, not NaN


def _log_target(scores: Tensor, groups: Tensor, count: int, alpha: float) -> Tensor:
    """[N] log softmax(S/α) in the group. Differences first: α may be 1e-4, S/α loses digits."""
    below = scores - group_max(scores, groups, count)[groups]
    return group_log_softmax(below / alpha, groups, count).clamp(min=-_FAR)


@objective("infonca", paper="arXiv:2402.05369")
def infonca(
    logratios: Tensor,  # [N] nats
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, Positive] = 0.01,
    subtract_entropy: bool = False,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """-Σ_k q_k·log softmax(h)_k, q = softmax(S/α); h = β·logratio.

    subtract_entropy adds Σ_k q_k·log q_k: then it is KL(q || softmax(h)) ≥ 0, which ADPO names
    (β = 1/τ; q from a teacher: scores = log q, α = 1). The released recipe's α = 1e-4 makes q
    one-hot unless scores tie. One row: 0.
    """
    count, wrong = group_count(groups, num_groups, scores)
    log_target = _log_target(scores, groups, count, alpha)
    gap = -group_log_softmax(beta * logratios, groups, count)
    if subtract_entropy:
        gap = gap + log_target
    return marked(group_sum(log_target.exp() * gap, groups, count), wrong)


@objective("nca", paper="arXiv:2402.05369")
def nca(
    logratios: Tensor,  # [N] nats
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, Positive] = 0.01,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """-Σ_k [q_k·log σ(h_k) + log σ(-h_k)/K], q = softmax(S/α); h = β·logratio."""
    count, wrong = group_count(groups, num_groups, scores)
    target = _log_target(scores, groups, count, alpha).exp()
    share = group_sizes(groups, count).clamp(min=1).to(logratios.dtype).reciprocal()[groups]
    h = beta * logratios
    rows = target * softplus(-h) + share * softplus(h)
    return marked(group_sum(rows, groups, count), wrong)


@objective("swepo", paper="arXiv:2412.04628")
def swepo(
    logratios: Tensor,  # [N] nats
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, NonNegative] = 1.0,
    power: Annotated[float, NonNegative] = 1,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """log Σ_all e^{e_k} - log Σ_positive e^{e_k}, e_k = h_k + α·|S_k - mean S|^power.

    Positive: S_k > mean S. No positive (all scores equal, one row): 0.
    """
    count, wrong = group_count(groups, num_groups, scores)
    deviation = group_center(scores, groups, count)
    # |deviation|**power leaves float32; 0·inf and the difference of two infinities are NaN.
    powers = (deviation.abs() ** power).clamp(max=torch.finfo(deviation.dtype).max)
    strengths = beta * logratios + (alpha * powers).clamp(max=_FAR)

    def total(members: Tensor) -> Tensor:
        return group_logsumexp(torch.where(members, strengths, -math.inf), groups, count)

    # ~(<=): beside an infinite score deviations are NaN, which shall not be "no positive".
    positive, negative = total(~(deviation <= 0)), total(deviation <= 0)
    # log(P + Q) - log P = log(1 + Q/P): no difference of two large numbers
    gap = torch.where(positive != -math.inf, negative - positive, -math.inf)
    return marked(softplus(gap), wrong)


@objective("mdpo_multisample", paper="arXiv:2410.12138")
def mdpo_multisample(
    logratios: Tensor,  # [N] nats
    labels: Tensor,  # [N] bool, member of the preferred set
    groups: Tensor,  # [N] int64, sorted
    *,
    beta: Annotated[float, Positive] = 0.1,
    loss: Annotated[str, OneOf("sigmoid", "ipo")] = "sigmoid",
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats, ipo: nats²
    """-log σ(β·m), or (m - 1/(2β))² with "ipo" (mIPO).

    m = mean log-ratio of the labelled rows - mean of the others. A group without one of the
    sides: 0.
    """
    count, wrong = group_count(groups, num_groups)
    labels, no_labels = truths(labels)

    def mean_and_size(members: Tensor) -> tuple[Tensor, Tensor]:
        size = group_sum(members.to(logratios.dtype), groups, count)
        total = group_sum(torch.where(members, logratios, 0), groups, count)
        return total / size.clamp(min=1), size

    (won, winners), (lost, losers) = mean_and_size(labels), mean_and_size(~labels)
    margin = won - lost
    rows = -F.logsigmoid(beta * margin) if loss == "sigmoid" else (margin - 0.5 / beta).square()
    return marked(torch.where((winners > 0) & (losers > 0), rows, 0), wrong, no_labels)


@objective("brain", paper="arXiv:2402.02479")
def brain(
    logps: Tensor,  # [N] nats
    ref_logps: Tensor,  # [N] nats, of the base model
    sampler_logps: Tensor,  # [N] nats, of the distribution the rows were drawn from
    scores: Tensor,  # [N] higher is better
    groups: Tensor,  # [N] int64, sorted
    *,
    temperature: Annotated[float, Positive] = 1.0,
    num_groups: NumGroups = None,
) -> Tensor:  # [G] nats
    """Σ_k α_k·(log α_k - log b_k): KL from the self-normalised posterior to the policy.

    log α = log softmax(S/temperature + ref - sampler), log b = log softmax(logps - sampler), both
    in the group; α is constant. One row: 0.
    """
    count, wrong = group_count(groups, num_groups, scores)
    strengths = scores / temperature + ref_logps - sampler_logps
    posterior = group_log_softmax(strengths, groups, count).clamp(min=-_FAR)
    policy = group_log_softmax(logps - sampler_logps, groups, count)
    return marked(group_sum(posterior.exp() * (posterior - policy), groups, count), wrong)
