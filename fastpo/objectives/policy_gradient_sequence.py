"""Policy gradient with one ratio per row, clipped before or after the sum. All return [N].

Family "policy_gradient". Advantages are [N]; a row without scored tokens has ratio 1, -A without
gradient.
"""

import torch
from torch import Tensor

from ._math import exp_cap, masked_mean, masked_sum
from ._policy import Batch, Coefficient, Epsilon, OptionalEpsilon, clipped, log_ratios
from ._registry import objective

_PER_ROW = {"advantages": "N"}


@objective("gmpo", paper="arXiv:2507.20673", family="policy_gradient", shapes=_PER_ROW)
def gmpo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    ref_token_logps: Tensor | None = None,  # [N, T] nats
    entropy: Tensor | None = None,  # [N, T] nats
    *,
    epsilon_low: Epsilon = 0.4,
    epsilon_high: OptionalEpsilon = None,
    beta: Coefficient = 0.0,
    entropy_coef: Coefficient = 0.0,
) -> Tensor:  # [N]
    """-exp⁺(mean_t of clipped x_t)·A + β·mean_t k3(ref_t - logp_t) - entropy bonus.

    x_t = logp_t - old_t is clipped on the side A pushes: at most ε_high if A > 0, else at least
    -ε_low. Epsilons are in nats; epsilon_high None: epsilon_low.
    """
    batch = Batch(token_logps, mask, advantages, old_token_logps, ref_token_logps, entropy)
    x = log_ratios(token_logps, old_token_logps)
    high = epsilon_low if epsilon_high is None else epsilon_high
    inside = torch.where(advantages[:, None] > 0, x.clamp(max=high), x.clamp(min=-epsilon_low))
    rows = -exp_cap(masked_mean(inside, mask)) * advantages
    if beta != 0:
        rows = rows + beta * masked_mean(batch.kl(beta), mask)
    return rows - entropy_coef * batch.entropy_mean(entropy_coef) if entropy_coef != 0 else rows


@objective("rloo", paper="arXiv:2402.14740", family="policy_gradient", shapes=_PER_ROW)
def rloo(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    advantages: Tensor,  # [N]
    old_token_logps: Tensor | None = None,  # [N, T] nats
    *,
    epsilon_low: Epsilon = 0.2,
    epsilon_high: OptionalEpsilon = None,
) -> Tensor:  # [N]
    """-min(w·A, clamp(w, 1 - ε_low, 1 + ε_high)·A), w = exp⁺(Σ_m (logp_t - old_t)).

    epsilon_high None: epsilon_low. Advantages come from rloo_advantages, the KL is in the reward.
    """
    ratio = exp_cap(masked_sum(log_ratios(token_logps, old_token_logps), mask))
    return clipped(ratio, advantages, low=epsilon_low, high=epsilon_high)
