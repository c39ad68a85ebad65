"""Pairs: objectives of the two log-ratios.

The family outgrows one file; its modules differ by what they read, and each registers with
`family="pairs"`:

    pairs.py             the log-ratios (and lengths, labels, weights): dpo and its losses
    pairs_logps.py       log-probabilities without a reference: sft, cpo, simpo, orpo
    pairs_scores.py      a score per response: sppo, odpo, mmpo, online_dpo
    pairs_third.py       a third sequence: vpo, rationale_dpo, tpo_triple
    pairs_references.py  past policies and several references: inpo, mnpo, mrpo
    pairs_batch.py       the rest of the batch: rpo_relative, sspo

`a, b` are the chosen and rejected log-ratios, `Δ = a - b`, in nats. All return [B].
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ._math import REDUCTIONS, avg, exp_cap, logistic, nll_term
from ._parameters import Interval, NonNegative, OneOf, Positive, Unit
from ._registry import objective
from .transforms import f_divergence


@objective("dpo", paper="arXiv:2305.18290", family="pairs", aliases=("sigmoid", "cdpo", "spin"))
def dpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    soft_labels: Tensor | None = None,  # [B]
    margins: Tensor | None = None,  # [B] in units of the logit
    pair_weights: Tensor | None = None,  # [B]
    *,
    beta: Annotated[float, Positive] = 0.1,
    label_smoothing: Annotated[float, Unit] = 0.0,
) -> Tensor:  # [B] nats
    """pair_weights · L(β·Δ - margins; t), L(z; t) = -t·log σ(z) - (1-t)·log σ(-z).

    t = soft_labels, or 1 - label_smoothing (cDPO) without them; t may leave [0, 1].
    """
    if soft_labels is not None and label_smoothing != 0:
        raise ValueError(f"label_smoothing: expected 0 with soft_labels, got {label_smoothing}")
    z = beta * (chosen_logratios - rejected_logratios)
    if margins is not None:
        z = z - margins
    rows = logistic(z, 1 - label_smoothing if soft_labels is None else soft_labels)
    return rows if pair_weights is None else pair_weights * rows


@objective("robust_dpo", paper="arXiv:2403.00409", family="pairs", aliases=("robust",))
def robust_dpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    label_smoothing: Annotated[float, Interval(0, 0.5, "[)")] = 0.1,
) -> Tensor:  # [B] nats
    """[-(1-ε)·log σ(β·Δ) + ε·log σ(-β·Δ)] / (1 - 2ε): L with a label above 1, unbounded below."""
    t = (1 - label_smoothing) / (1 - 2 * label_smoothing)
    return logistic(beta * (chosen_logratios - rejected_logratios), t)


@objective("hinge", paper="arXiv:2305.10425, arXiv:2309.06657", family="pairs", aliases=("slic",))
def hinge(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B]
    """max(0, 1 - β·Δ)."""
    return torch.relu(1 - beta * (chosen_logratios - rejected_logratios))


@objective("ipo", paper="arXiv:2310.12036", family="pairs")
def ipo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats²
    """(Δ - 1/(2β))² on summed log-ratios, as printed."""
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()


@objective("ipo_norm", paper="arXiv:2310.12036", family="pairs")
def ipo_norm(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats²
    """(a/n_c - b/n_r - 1/(2β))²: log-ratios per token, TRL's `ipo`."""
    gap = avg(chosen_logratios, chosen_lengths) - avg(rejected_logratios, rejected_lengths)
    return (gap - 1 / (2 * beta)).square()


@objective(
    "dpo_norm",
    paper="arXiv:2411.15124, arXiv:2407.15229",
    family="pairs",
    aliases=("sigmoid_norm",),
)
def dpo_norm(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 5.0,
) -> Tensor:  # [B] nats
    """-log σ(β·(a/n_c - b/n_r))."""
    gap = avg(chosen_logratios, chosen_lengths) - avg(rejected_logratios, rejected_lengths)
    return -F.logsigmoid(beta * gap)


@objective("exo_pair", paper="arXiv:2402.00856", family="pairs")
def exo_pair(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    label_smoothing: Annotated[float, Interval(0, 1, "()")] = 0.001,
) -> Tensor:  # [B] nats
    """σ(z)·(log σ(z) - log(1-ε)) + σ(-z)·(log σ(-z) - log ε), z = β·Δ."""
    z = beta * (chosen_logratios - rejected_logratios)
    win = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return win + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))


@objective("nca_pair", paper="arXiv:2402.05369", family="pairs")
def nca_pair(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B] nats
    """-log σ(β·a) - ½·log σ(-β·a) - ½·log σ(-β·b)."""
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@objective("bco_pair", paper="arXiv:2404.04656", family="pairs")
def bco_pair(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    delta: float = 0.0,
) -> Tensor:  # [B] nats
    """-log σ(β·a - δ) - log σ(-(β·b - δ)), δ = the caller's running mean of rewards."""
    return -F.logsigmoid(beta * chosen_logratios - delta) - F.logsigmoid(
        delta - beta * rejected_logratios
    )


@objective("sppo_hard", paper="arXiv:2405.00675", family="pairs")
def sppo_hard(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.001,
) -> Tensor:  # [B] nats²
    """(a - 1/(2β))² + (b + 1/(2β))²: win probabilities 1 and 0."""
    target = 1 / (2 * beta)
    return (chosen_logratios - target).square() + (rejected_logratios + target).square()


@objective("aot", paper="arXiv:2406.05882", family="pairs", refuses_weights=True)
def aot(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    ref_chosen_logps: Tensor,  # [B] nats
    ref_rejected_logps: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    label_smoothing: Annotated[float, Unit] = 0.0,
) -> Tensor:  # [B] nats; row i is the i-th rank, not pair i
    """L(β·d; 1 - ε), d = sorted(c - r) - sorted(c0 - r0) over the local batch."""
    policy = (chosen_logps - rejected_logps).sort().values
    reference = (ref_chosen_logps - ref_rejected_logps).sort().values
    return logistic(beta * (policy - reference), 1 - label_smoothing)


@objective("aot_unpaired", paper="arXiv:2406.05882", family="pairs", refuses_weights=True)
def aot_unpaired(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    label_smoothing: Annotated[float, Unit] = 0.0,
) -> Tensor:  # [B] nats; row i is the i-th rank, not pair i
    """L(β·d; 1 - ε), d = sorted(a) - sorted(b) over the local batch."""
    gap = chosen_logratios.sort().values - rejected_logratios.sort().values
    return logistic(beta * gap, 1 - label_smoothing)


@objective("apo_zero", paper="arXiv:2408.06266", family="pairs")
def apo_zero(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B]
    """σ(-β·a) + σ(β·b): chosen up, rejected down. 1 - σ(x) is σ(-x), without cancellation."""
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


@objective("apo_down", paper="arXiv:2408.06266", family="pairs")
def apo_down(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
) -> Tensor:  # [B]
    """σ(β·a) + σ(-β·Δ): both down, rejected more; for chosen worse than the model."""
    gap = chosen_logratios - rejected_logratios
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * gap)


@objective("discopop", paper="arXiv:2406.08414", family="pairs")
def discopop(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.05,
    tau: Annotated[float, Positive] = 0.05,
) -> Tensor:  # [B] nats
    """-σ(-x/τ)·log σ(x) + σ(x/τ)·e^{-x}, x = β·Δ: logistic and exponential loss, mixed."""
    x = beta * (chosen_logratios - rejected_logratios)
    # In log space: σ(x/τ)·e^{-x} is 0·inf at x < -88.7, where TRL's gradient turns NaN.
    exponential = exp_cap(F.logsigmoid(x / tau) - x)
    return -torch.sigmoid(-x / tau) * F.logsigmoid(x) + exponential


@objective("f_dpo", paper="arXiv:2309.16240", family="pairs")
def f_dpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    divergence: Annotated[str, OneOf("reverse_kl", "forward_kl", "js", "alpha")] = "reverse_kl",
    alpha: float = 0.5,
) -> Tensor:  # [B] nats
    """-log σ(β·(s(a) - s(b))), s of the transform f_divergence; alpha is the paper's."""
    scores = f_divergence(chosen_logratios, rejected_logratios, divergence=divergence, alpha=alpha)
    return dpo(scores["chosen_logratios"], scores["rejected_logratios"], beta=beta)


@objective("lcpo", paper="arXiv:2509.24159", family="pairs")
def lcpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    eta: Annotated[float, Interval(0, 1, "()")] = 0.9,
    base: Annotated[str, OneOf("dpo", "ipo")] = "dpo",
) -> Tensor:  # [B] nats, ipo: nats²
    """w·l₊ + (1 - w)·l₋: the base loss for the label as given and reversed.

    w = σ(log(η/(1-η)) + l₋ - l₊) without gradient: the probability that the label is right. η is
    the caller's running mean of w.
    """
    loss = dpo if base == "dpo" else ipo
    given = loss(chosen_logratios, rejected_logratios, beta=beta)
    reversed_ = loss(rejected_logratios, chosen_logratios, beta=beta)
    log_odds = (math.log(eta) - math.log1p(-eta) + reversed_ - given).detach()
    return torch.sigmoid(log_odds) * given + torch.sigmoid(-log_odds) * reversed_


@objective("flex_dpo", paper="arXiv:2406.07327", family="pairs")
def flex_dpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta_chosen: Annotated[float, Positive] = 0.1,
    beta_rejected: Annotated[float, Positive] = 0.05,
) -> Tensor:  # [B] nats
    """-log σ(β_chosen·a - β_rejected·b); the paper takes β_rejected < β_chosen."""
    return -F.logsigmoid(beta_chosen * chosen_logratios - beta_rejected * rejected_logratios)


@objective("focalpo", paper="arXiv:2501.06645", family="pairs")
def focalpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    gamma: Annotated[float, NonNegative] = 0.05,
) -> Tensor:  # [B] nats
    """-σ(z)^γ·log σ(z), z = β·Δ; the factor is differentiated too."""
    log_win = F.logsigmoid(beta * (chosen_logratios - rejected_logratios))
    return -(gamma * log_win).exp() * log_win


@objective("dpo_sft", paper="arXiv:2404.19733", family="pairs", aliases=("irpo",))
def dpo_sft(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    chosen_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 0.1,
    sft_weight: Annotated[float, NonNegative] = 1.0,
    sft_reduction: Annotated[str, OneOf(*REDUCTIONS)] = "mean",
) -> Tensor:  # [B] nats
    """-log σ(β·Δ) + sft_weight·NLL(chosen_logps, chosen_lengths; sft_reduction)."""
    rows = dpo(chosen_logratios, rejected_logratios, beta=beta)
    return rows + sft_weight * nll_term(chosen_logps, chosen_lengths, sft_reduction)
