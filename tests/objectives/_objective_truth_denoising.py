"""Truths of the denoising objectives."""

import torch
from _objective_truth import loss, truth


@truth("diffusion_dpo", {"beta": 0.5, "sft_weight": 0.3})
def diffusion_dpo(w, l, ref_w, ref_l, t=1, labels=1, *, beta=1000.0, sft_weight=0.0):
    # Logits of some thousands: the naive log σ has no value there, so its asymptote.
    z = -beta * t * ((w - ref_w) - (l - ref_l))
    far = z.abs() > 100
    near = loss(torch.where(far, 0, z), labels)
    linear = torch.where(z > 0, (1 - labels) * z, -labels * z)
    return torch.where(far, linear, near) + sft_weight * w


@truth("prdp", {"beta": 0.7, "epsilon": 0.8}, {"epsilon": 0.0})
def prdp(w, l, w0, l0, w_old, l_old, w_mask, l_mask, s_w, s_l, *, beta=10.0, epsilon=0.0001):
    def clipped(x, ref, old):
        low, high = old - ref - epsilon, old - ref + epsilon
        return torch.minimum(torch.maximum(x - ref, low), high)

    rows = []
    for i in range(len(w)):
        m, n = w_mask[i], l_mask[i]
        target = (s_w[i] - s_l[i]) / beta
        plain = (w[i] - w0[i])[m].sum() - (l[i] - l0[i])[n].sum()
        won, lost = clipped(w[i], w0[i], w_old[i]), clipped(l[i], l0[i], l_old[i])
        proximal = won[m].sum() - lost[n].sum()
        rows.append(torch.maximum((plain - target) ** 2, (proximal - target) ** 2))
    return torch.stack(rows) if rows else w.sum(-1)


@truth("reward_weighted_denoising", {"beta": 2.0})
def reward_weighted_denoising(errors, scores, *, beta=1.0):
    return errors * torch.exp(scores / beta)


@truth("distillation_dpo")
def distillation_dpo(gap_w, gap_l, move_w, move_l):
    return (gap_w * move_w).mean(-1) - (gap_l * move_l).mean(-1)
