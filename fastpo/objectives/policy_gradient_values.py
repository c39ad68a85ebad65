"""Critics, and policies regressed on values. All return [N].

Family "policy_gradient". l_t = logp_t - ref_t; means are per row, and over nothing 0.
"""

from typing import Annotated

import torch
from torch import Tensor

from ._math import group_sum, k3, masked_mean
from ._parameters import NonNegative, Positive
from ._policy import Coefficient, token_mean
from ._registry import objective

_VALUES = {"values": "N T"}


@objective(
    "ppo_value",
    paper="arXiv:1707.06347",
    family="policy_gradient",
    gradient_into=("values",),
    shapes=_VALUES,
)
def ppo_value(
    values: Tensor,  # [N, T], carries gradient
    old_values: Tensor,  # [N, T]
    returns: Tensor,  # [N, T]
    mask: Tensor,  # [N, T] bool
    *,
    clip: Annotated[float, NonNegative] = 0.2,
) -> Tensor:  # [N]
    """½·max((v - R)², (v' - R)²), v' = clamp(v, old_v ± clip); mean over all scored tokens."""
    near = values.clamp(old_values - clip, old_values + clip)
    errors = torch.maximum((values - returns).square(), (near - returns).square())
    return token_mean(0.5 * errors, mask)


def _rest(x: Tensor, mask: Tensor) -> Tensor:
    """[N, T] Σ_{k≥t} x_k over scored positions."""
    return torch.where(mask, x, 0).flip(-1).cumsum(-1).flip(-1)


@objective("oreo", paper="arXiv:2412.16145", family="policy_gradient", shapes=_VALUES)
def oreo(
    token_logps: Tensor,  # [N, T] nats
    ref_token_logps: Tensor,  # [N, T] nats
    values: Tensor,  # [N, T]
    scores: Tensor,  # [N]
    mask: Tensor,  # [N, T] bool
    token_reverse_kl: Tensor | None = None,  # [N, T] nats
    *,
    beta: Annotated[float, Positive] = 0.03,
    kl_coef: Coefficient = 0.01,
) -> Tensor:  # [N]
    """mean_t [β·(l_t + sg(Σ_{k>t} l_k)) + V_t - scores]² + kl_coef·mean_t KL_t.

    V is constant. KL_t = token_reverse_kl, or k3(ref_t - logp_t) without it.
    """
    x = token_logps - ref_token_logps
    rest = _rest(x.detach(), mask) + (x - x.detach())  # value Σ_{k≥t}, gradient of l_t alone
    errors = (beta * rest + values - scores[:, None]).square()
    kl = k3(-x) if token_reverse_kl is None else token_reverse_kl
    return masked_mean(errors, mask) + kl_coef * masked_mean(kl, mask)


@objective(
    "oreo_value",
    paper="arXiv:2412.16145",
    family="policy_gradient",
    gradient_into=("values",),
    shapes=_VALUES,
)
def oreo_value(
    token_logps: Tensor,  # [N, T] nats, constant here
    ref_token_logps: Tensor,  # [N, T] nats
    values: Tensor,  # [N, T], carries gradient
    scores: Tensor,  # [N]
    mask: Tensor,  # [N, T] bool
    *,
    beta: Annotated[float, Positive] = 0.03,
) -> Tensor:  # [N]
    """mean_t [V_t + β·sg(Σ_{k≥t} l_k) - scores]²: oreo's critic, gradient into values only."""
    rest = _rest((token_logps - ref_token_logps).detach(), mask)
    return masked_mean((values + beta * rest - scores[:, None]).square(), mask)


def _step_sums(segments: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """[N, T] size of every step of a row, then the sum of each column over it; 0 beyond the last.

    Steps are the ids ≥ 0 of a row, contiguous or not. Sorted, then summed without atomics, and no
    id is read on the host.
    """
    n, t = segments.shape
    ids, order = segments.sort(dim=-1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    row = torch.arange(n, dtype=torch.int64, device=ids.device)
    places = row[:, None] * t + first.cumsum(-1) - 1
    inside = ids >= 0

    def total(x: Tensor) -> Tensor:
        kept = torch.where(inside, x.gather(-1, order), 0)
        return group_sum(kept.flatten(), places.flatten(), n * t).view(n, t)

    return total(torch.ones_like(columns[0])), *map(total, columns)


@objective(
    "direct_advantage",
    paper="arXiv:2412.18279",
    family="policy_gradient",
    shapes={"advantages": "N T"},
)
def direct_advantage(
    token_logps: Tensor,  # [N, T] nats
    ref_token_logps: Tensor,  # [N, T] nats
    advantages: Tensor,  # [N, T]
    segments: Tensor,  # [N, T] int64, step or -1
    mask: Tensor,  # [N, T] bool
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [N]
    """½·(A_s/β - Σ_{t∈s} l_t)², mean over the steps of the row; a row without steps gives 0.

    A step is the scored tokens of one segment id ≥ 0, A_s the mean of their advantages.
    """
    scored = torch.where(mask, segments, -1)
    sizes, ratios, totals = _step_sums(scored, token_logps - ref_token_logps, advantages)
    errors = 0.5 * (totals / sizes.clamp(min=1) / beta - ratios).square()
    return masked_mean(errors, sizes > 0)
