"""Denoising: diffusion and flow, squared errors in place of log-probabilities.

`e` is the squared denoising error. Every objective of a pair's log-ratios serves after the
transform `denoising_logratios`; for others the log-ratio is -(error - ref_error). Sums of Gaussian
transition log-ratios enter as log-ratios directly.
"""

from typing import Annotated

import torch
from torch import Tensor

from ._math import exp_cap, masked_sum
from ._parameters import NonNegative, Positive
from ._registry import objective
from .pairs import dpo
from .transforms import denoising_logratios


@objective("diffusion_dpo", paper="arXiv:2311.12908", family="denoising")
def diffusion_dpo(
    chosen_errors: Tensor,  # [B]
    rejected_errors: Tensor,  # [B]
    ref_chosen_errors: Tensor,  # [B]
    ref_rejected_errors: Tensor,  # [B]
    timestep_weights: Tensor | None = None,  # [B]
    soft_labels: Tensor | None = None,  # [B]
    *,
    beta: Annotated[float, Positive] = 1000.0,
    sft_weight: Annotated[float, NonNegative] = 0.0,
) -> Tensor:  # [B] nats
    """L(z; t) + sft_weight·e_w, z = -β·w·[(e_w - e_w^ref) - (e_l - e_l^ref)].

    w = timestep_weights or 1, t = soft_labels or 1 (it may leave [0, 1]). β is the paper's
    β·T·ω with the released code's factor ½: 1000 is ½·2000; SDXL takes ½·5000.
    """
    errors = (chosen_errors, rejected_errors, ref_chosen_errors, ref_rejected_errors)
    won, lost = denoising_logratios(*errors, timestep_weights, scale=beta).values()
    return dpo(won, lost, soft_labels, beta=1.0) + sft_weight * chosen_errors


@objective("prdp", paper="arXiv:2402.08714", family="denoising")
def prdp(
    chosen_token_logps: Tensor,  # [B, T] nats, one position per denoising step
    rejected_token_logps: Tensor,  # [B, T]
    ref_chosen_token_logps: Tensor,  # [B, T]
    ref_rejected_token_logps: Tensor,  # [B, T]
    old_chosen_token_logps: Tensor,  # [B, T]
    old_rejected_token_logps: Tensor,  # [B, T]
    chosen_mask: Tensor,  # [B, T] bool
    rejected_mask: Tensor,  # [B, T] bool
    chosen_scores: Tensor,  # [B]
    rejected_scores: Tensor,  # [B]
    *,
    beta: Annotated[float, Positive] = 10.0,
    epsilon: Annotated[float, NonNegative] = 0.0001,
) -> Tensor:  # [B] nats²
    """max((Σl_w - Σl_l - g)², (Σl'_w - Σl'_l - g)²), g = (s_w - s_l)/β: proximal regression.

    Per scored step l = logp - ref, and l' is l kept within ε of the sampler's old - ref. Where
    the clipped square is larger, clipped steps have no gradient. Unclipped it is `egpo`.
    """

    def side(logps: Tensor, ref: Tensor, old: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        near = old - ref + (logps - old).clamp(-epsilon, epsilon)
        return masked_sum(logps - ref, mask), masked_sum(near, mask)

    won, near_won = side(
        chosen_token_logps, ref_chosen_token_logps, old_chosen_token_logps, chosen_mask
    )
    lost, near_lost = side(
        rejected_token_logps, ref_rejected_token_logps, old_rejected_token_logps, rejected_mask
    )
    target = (chosen_scores - rejected_scores) / beta
    free, clipped = won - lost - target, near_won - near_lost - target
    return torch.maximum(free.square(), clipped.square())


@objective("reward_weighted_denoising", paper="arXiv:2501.13918", family="denoising")
def reward_weighted_denoising(
    errors: Tensor,  # [N]
    scores: Tensor,  # [N]
    *,
    beta: Annotated[float, Positive] = 1.0,
) -> Tensor:  # [N]
    """exp⁺(scores/β)·errors. Scores 0 give the plain denoising loss."""
    return exp_cap(scores / beta) * errors


@objective("distillation_dpo", paper="arXiv:2504.11447", family="denoising")
def distillation_dpo(
    chosen_score_gaps: Tensor,  # [B, D] teacher noise - auxiliary noise
    rejected_score_gaps: Tensor,  # [B, D]
    chosen_displacements: Tensor,  # [B, D] noised sample - sample
    rejected_displacements: Tensor,  # [B, D]
) -> Tensor:  # [B]
    """mean_d(gap_w·disp_w) - mean_d(gap_l·disp_l), gradient into the displacements only.

    A score-difference gradient written as a loss, not a log-ratio.
    """
    won, lost = (
        chosen_score_gaps * chosen_displacements,
        rejected_score_gaps * rejected_displacements,
    )
    return (won - lost).sum(1) / max(won.shape[1], 1)
