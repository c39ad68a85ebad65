"""Single responses: one row per completion, desirable or not. All return [N].

`x` is the log-ratio of the row, in nats. A batch with only one kind of label is legal everywhere.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import (
    REDUCTIONS,
    exp_cap,
    logistic,
    marked,
    masked_sum,
    mean_or_zero,
    nll_term,
    shares,
    truths,
)
from ._parameters import NonNegative, OneOf, Positive, Unit
from ._registry import objective


@objective("nll", family="singles")
def nll(
    logps: Tensor,  # [N] nats
    lengths: Tensor,  # [N] int64
    *,
    reduction: Annotated[str, OneOf(*REDUCTIONS)] = "batch",
) -> Tensor:  # [N] nats
    """NLL(logps, lengths; reduction); "batch" averages to the token mean."""
    return nll_term(logps, lengths, reduction)


@objective("weighted_nll", paper="arXiv:2309.11235", family="singles", aliases=("c_rlft",))
def weighted_nll(
    logps: Tensor,  # [N] nats
    lengths: Tensor,  # [N] int64
    sample_weights: Tensor,  # [N]
    *,
    reduction: Annotated[str, OneOf(*REDUCTIONS)] = "mean",
) -> Tensor:  # [N] nats
    """sample_weights·NLL(logps, lengths; reduction); the weights do not enter the normaliser."""
    return sample_weights * nll_term(logps, lengths, reduction)


@objective("dft", paper="arXiv:2508.05629", family="singles")
def dft(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
) -> Tensor:  # [N] nats
    """-(N / tokens of the batch)·Σ_t p_t·log p_t, p_t without gradient."""
    total = masked_sum(exp_cap(token_logps.detach()) * token_logps, mask)
    return -len(mask) * total / mask.sum().clamp(min=1)


@objective("ift", paper="arXiv:2405.11870", family="singles")
def ift(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    *,
    gamma: Annotated[float, Unit] = 0.95,
    detach_weights: bool = False,
) -> Tensor:  # [N] nats
    """Σ_t w_t·l_t / max(Σ_t w_t, 1e-12), l_t = -log p_t, w_t = Σ_{k≥t} γ^(k-t)·l_k.

    Over scored tokens, counted in order. The gradient flows through w too, unless detach_weights.
    """
    losses = -token_logps
    weights = torch.where(mask, _discounted_to_go(losses, mask, gamma), 0)
    if detach_weights:
        weights = weights.detach()
    return (weights * losses).sum(-1) / weights.sum(-1).clamp(min=1e-12)


def _discounted_to_go(
    x: Tensor,  # [N, T], 0 where not scored
    mask: Tensor,  # [N, T] bool
    gamma: float,
) -> Tensor:  # [N, T]
    """w_t = x_t + a_t·w_{t+1}, a_t = γ at scored positions, else 1.

    Spans double in length: log T steps where the recursion has T. Nothing is divided by a power
    of γ, which a ratio of two sums would be: 0.95^2000 is 0 in float32.
    """
    decay = torch.full_like(x, gamma).masked_fill(~mask, 1)
    span, width = 1, x.shape[1]
    while span < width:
        x = x + decay * F.pad(x[:, span:], (0, span))
        decay = decay * F.pad(decay[:, span:], (0, span))
        span *= 2
    return x


@objective("preference_guided_mle", paper="arXiv:2306.00398", family="singles")
def preference_guided_mle(
    token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    token_weights: Tensor,  # [N, T] reward per token
    entropy: Tensor | None = None,  # [N, T] nats
    *,
    to_go: bool = False,
    entropy_coef: Annotated[float, NonNegative] = 0.0,
) -> Tensor:  # [N] nats
    """-Σ_t (g_t / Σ g)·log p_t - entropy_coef·Σ_t entropy_t, g = token_weights.

    to_go makes g_t the sum of the rewards from t on. The first term is 0 where Σ g = 0.
    """
    g = token_weights.flip(-1).cumsum(-1).flip(-1) if to_go else token_weights
    total = masked_sum(g, mask)
    rows = -masked_sum(g * token_logps, mask) / torch.where(total == 0, torch.inf, total)
    if entropy_coef == 0:
        return rows
    if entropy is None:
        raise ValueError(f"entropy: expected a tensor with entropy_coef {entropy_coef}, got None")
    return rows - entropy_coef * entropy.sum(-1)


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
    desirable, wrong = truths(labels)
    z = beta * (logratios - mean_or_zero(kl_logratios).clamp(min=0))
    good, bad = desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z)
    return marked(torch.where(desirable, good, bad), wrong)


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
    desirable, wrong = truths(labels)
    z = beta * logratios
    good, bad = desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z)
    return marked(torch.where(desirable, good, bad), wrong)


@objective("bco", paper="arXiv:2404.04656", family="singles")
def bco(
    logratios: Tensor,  # [N] nats
    labels: Tensor,  # [N] bool, desirable?
    *,
    beta: Annotated[float, Positive] = 0.1,
    delta: float = 0.0,
) -> Tensor:  # [N] nats
    """Desirable: -log σ(β·x - δ); undesirable: -log σ(δ - β·x).

    δ is the caller's running mean of rewards.
    """
    desirable, wrong = truths(labels)
    rows = logistic(beta * logratios - delta, desirable.to(logratios.dtype))
    return marked(rows, wrong)


@objective("depo", paper="arXiv:2511.15392", family="singles")
def depo(
    logratios: Tensor,  # [N] nats
    labels: Tensor,  # [N] bool, desirable?
    kl_logratios: Tensor,  # [M] nats, mismatched rows
    lengths: Tensor,  # [N] int64
    steps: Tensor,  # [N] int64, steps of the trajectory
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha_token: Annotated[float, NonNegative] = 1.0,
    alpha_step: Annotated[float, NonNegative] = 1.0,
    desirable_weight: Annotated[float, NonNegative] = 1.0,
    undesirable_weight: Annotated[float, NonNegative] = 1.0,
) -> Tensor:  # [N]
    """kto with a bonus for few steps and few tokens per step inside the desirable logit.

    Desirable: w·σ(-(β·(x - z0) + alpha_token / T_token + alpha_step / T_step)); undesirable and
    z0 as in kto. T_step = max(steps, 1), T_token = max(lengths / T_step, 1).
    """
    desirable, wrong = truths(labels)
    per_step = steps.clamp(min=1).to(logratios.dtype)
    per_token = (lengths / per_step).clamp(min=1)
    z = beta * (logratios - mean_or_zero(kl_logratios).clamp(min=0))
    bonus = alpha_token / per_token + alpha_step / per_step
    good = desirable_weight * torch.sigmoid(-(z + bonus))
    rows = torch.where(desirable, good, undesirable_weight * torch.sigmoid(z))
    return marked(rows, wrong)


@objective("ulma", paper="arXiv:2312.02554", family="singles")
def ulma(
    logps: Tensor,  # [N] nats
    logratios: Tensor,  # [N] nats
    labels: Tensor,  # [N] bool, desirable?
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [N] nats
    """Desirable: -log p; undesirable: -log σ(-β·x)."""
    desirable, wrong = truths(labels)
    return marked(torch.where(desirable, -logps, -F.logsigmoid(-beta * logratios)), wrong)


@objective("pointwise_dpo", paper="arXiv:2312.02554", family="singles")
def pointwise_dpo(
    logratios: Tensor,  # [N] nats
    labels: Tensor,  # [N] bool, desirable?, or a float in [0, 1]
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [N] nats
    """L(β·x; labels)."""
    desirable, wrong = shares(labels, logratios.dtype)
    return marked(logistic(beta * logratios, desirable), wrong)


@objective("pmpo", paper="arXiv:2410.04166", family="singles")
def pmpo(
    logps: Tensor,  # [N] nats
    labels: Tensor,  # [N] bool, desirable?
    forward_kl: Tensor | None = None,  # [N] nats, Σ_t KL(ref || pi)
    *,
    alpha: Annotated[float, Unit] = 0.5,
    beta: Annotated[float, NonNegative] = 0.5,
) -> Tensor:  # [N] nats
    """Desirable: -α·(N/N_good)·log p; undesirable: (1-α)·(N/N_bad)·log p; both + β·forward_kl.

    Unbounded below for α < 1 and β = 0.
    """
    good, wrong = truths(labels)
    count = torch.where(good, good.sum(), (~good).sum()).to(logps.dtype)
    rows = torch.where(good, -alpha * logps, (1 - alpha) * logps) * (len(good) / count)
    rows = marked(rows, wrong)
    if beta == 0:
        return rows
    if forward_kl is None:
        raise ValueError(f"forward_kl: expected a tensor with beta {beta}, got None")
    return rows + beta * forward_kl


@objective("gpo", paper="arXiv:2410.02197", family="singles")
def gpo(
    logratios: Tensor,  # [N] nats
    scores: Tensor,  # [N] mean preference score against the reference's samples
    *,
    beta: Annotated[float, Positive] = 0.001,
) -> Tensor:  # [N] nats²
    """(x - scores/β)²; the reference is the previous iterate."""
    return (logratios - scores / beta).square()


@objective("a2po", paper="arXiv:2505.20686", family="singles", shapes={"values": "N"})
def a2po(
    logratios: Tensor,  # [N] nats
    scores: Tensor,  # [N]
    values: Tensor,  # [N] optimal value of the prompt
    *,
    beta: Annotated[float, Positive] = 0.001,
) -> Tensor:  # [N]
    """(β·x - (scores - values))²: regression on the optimal advantage."""
    return (beta * logratios - (scores - values)).square()
