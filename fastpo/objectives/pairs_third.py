"""Pairs and a third sequence: a sample, a rationale, a gold answer, another image. Family "pairs".

`a, b` are the chosen and rejected log-ratios, `Δ = a - b`; `c, r` the log-probabilities; `y, y0`
the third sequence under policy and reference, all in nats. All return [B].
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from ._math import REDUCTIONS, logistic, nll_term
from ._parameters import NonNegative, OneOf, Positive, Unit
from ._registry import objective
from .pairs import dpo
from .pairs_logps import simpo


@objective("hypo", paper="arXiv:2406.01462", family="pairs")
def hypo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    third_logps: Tensor,  # [B] nats, sampled from the policy
    ref_third_logps: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    lam: Annotated[float, NonNegative] = 0.0001,
) -> Tensor:  # [B] nats
    """-log σ(β·Δ) + λ·sg(y - y0)·y: the score-function gradient of KL(pi || ref)."""
    kl = (third_logps - ref_third_logps).detach() * third_logps
    return dpo(chosen_logratios, rejected_logratios, beta=beta) + lam * kl


@objective("vpo", paper="arXiv:2405.19320", family="pairs")
def vpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    third_logps: Tensor,  # [B] nats, drawn from the calibration distribution
    ref_third_logps: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    alpha: Annotated[float, NonNegative] = 0.01,
    online: bool = True,
) -> Tensor:  # [B] nats
    """-log σ(β·Δ) ± α·β·(y - y0): + online (optimism), - offline (pessimism)."""
    value = alpha * beta * (third_logps - ref_third_logps)
    return dpo(chosen_logratios, rejected_logratios, beta=beta) + (value if online else -value)


@objective("rationale_dpo", paper="arXiv:2407.14477", family="pairs")
def rationale_dpo(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    third_logps: Tensor,  # [B] nats, the rationale
    *,
    beta: Annotated[float, Positive] = 0.1,
    gamma: Annotated[float, NonNegative] = 0.1,
    form: Annotated[str, OneOf("nll", "logistic")] = "nll",
) -> Tensor:  # [B] nats
    """-log σ(β·Δ), and nll (paper): -γ·y; logistic (released code): -log σ(γ·y)."""
    rationale = gamma * third_logps
    rows = dpo(chosen_logratios, rejected_logratios, beta=beta)
    return rows - (rationale if form == "nll" else F.logsigmoid(rationale))


@objective("rdpo_visual", paper="arXiv:2502.13146", family="pairs")
def rdpo_visual(
    chosen_logratios: Tensor,  # [B] nats
    rejected_logratios: Tensor,  # [B] nats
    third_logps: Tensor,  # [B] nats, chosen under the retrieved or corrupted image
    ref_third_logps: Tensor,  # [B] nats
    *,
    beta: Annotated[float, Positive] = 0.1,
    image_weight: Annotated[float, NonNegative] = 1.0,
    anchor_weight: Annotated[float, NonNegative] = 0.0,
    anchor: float = 0.0,
) -> Tensor:  # [B] nats
    """-log σ(β·Δ) - image_weight·log σ(β·(a - v)) - anchor_weight·log σ(β·a - anchor), v = y - y0.

    anchor_weight 1 is the multimodal mDPO (arXiv:2406.11839).
    """
    image = dpo(chosen_logratios, third_logps - ref_third_logps, beta=beta)
    anchored = -F.logsigmoid(beta * chosen_logratios - anchor)
    rows = dpo(chosen_logratios, rejected_logratios, beta=beta)
    return rows + image_weight * image + anchor_weight * anchored


@objective("tpo_triple", paper="arXiv:2405.16681", family="pairs")
def tpo_triple(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    third_logps: Tensor,  # [B] nats, the gold answer
    third_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 0.01,
    alpha: Annotated[float, NonNegative] = 1.0,
    label_smoothing: Annotated[float, Unit] = 0.0,
    sft_reduction: Annotated[str, OneOf(*REDUCTIONS)] = "mean",
) -> Tensor:  # [B] nats
    """L(β·(c - r); 1 - ε) + α·NLL(third_logps, third_lengths; sft_reduction), no reference."""
    rows = logistic(beta * (chosen_logps - rejected_logps), 1 - label_smoothing)
    return rows + alpha * nll_term(third_logps, third_lengths, sft_reduction)


@objective("tpo_triple_l", paper="arXiv:2405.16681", family="pairs")
def tpo_triple_l(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    chosen_lengths: Tensor,  # [B] int64
    rejected_lengths: Tensor,  # [B] int64
    third_logps: Tensor,  # [B] nats, the gold answer
    third_lengths: Tensor,  # [B] int64
    *,
    beta: Annotated[float, Positive] = 0.01,
    gamma: float = 0.5,
    alpha: Annotated[float, NonNegative] = 1.0,
    label_smoothing: Annotated[float, Unit] = 0.0,
    sft_reduction: Annotated[str, OneOf(*REDUCTIONS)] = "mean",
) -> Tensor:  # [B] nats
    """simpo + α·NLL(third_logps, third_lengths; sft_reduction). γ is in units of the logit."""
    sides = (chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    rows = simpo(*sides, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    return rows + alpha * nll_term(third_logps, third_lengths, sft_reduction)


@objective("typo", paper="arXiv:2407.09072", family="pairs")
def typo(
    chosen_logps: Tensor,  # [B] nats
    rejected_logps: Tensor,  # [B] nats
    third_logps: Tensor,  # [B] nats, sampled from the reference
    ref_third_logps: Tensor,  # [B] nats
    *,
    lam: Annotated[float, NonNegative] = 0.1,
) -> Tensor:  # [B] nats
    """-log σ(c - r) + λ·(y0 - y): no reference in the first term, a sampled KL(ref || pi) after."""
    return -F.logsigmoid(chosen_logps - rejected_logps) + lam * (ref_third_logps - third_logps)
