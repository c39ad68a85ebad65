"""Truths of the transforms, row by row and token by token: loops, no vector tricks."""

import math

import torch
from _objective_truth import truth


def sides(function, *pairs):
    """The dict of a two-sided transform from a function of one side."""
    chosen, rejected = (function(*side) for side in zip(*pairs, strict=True))
    return {"chosen_logratios": chosen, "rejected_logratios": rejected}


def rowwise(function, *columns):
    """Stack function(row) over the rows of the columns; an empty batch has an empty result."""
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return torch.stack(rows) if rows else columns[0].new_zeros(len(columns[0]))


@truth(
    "f_divergence",
    {"divergence": "forward_kl"},
    {"divergence": "js"},
    {"divergence": "alpha"},
    {"divergence": "alpha", "alpha": 1.0},
    {"divergence": "alpha", "alpha": -0.7},
    {"divergence": "alpha", "alpha": 1e-7},
)
def f_divergence(a, b, *, divergence="reverse_kl", alpha=0.5):
    def score(x):
        t = torch.exp(x)  # f'(t)
        if divergence == "forward_kl":
            return 1 - 1 / t
        if divergence == "js":
            return torch.log(2 * t / (1 + t))
        if divergence == "alpha" and abs(alpha) >= 1e-6:
            return (1 - t**-alpha) / alpha
        return torch.log(t)

    return sides(score, (a, b))


@truth("length_normalize", {"power": 0.5}, {"power": 0.0})
def length_normalize(a, b, n_c, n_r, *, power=1.0):
    return sides(lambda x, n: x / n.clamp(min=1).to(x.dtype) ** power, (a, b), (n_c, n_r))


@truth("ld_logps", {"ld_alpha": 0.0}, {"ld_alpha": 1.0})
def ld_logps(chosen, rejected, chosen_mask, rejected_mask, *, ld_alpha=0.5):
    def row(c, r, c_mask, r_mask):
        c, r = c[c_mask], r[r_mask]
        m = min(len(c), len(r))
        return torch.stack([x[:m].sum() + ld_alpha * x[m:].sum() for x in (c, r)])

    both = rowwise(row, chosen, rejected, chosen_mask, rejected_mask).reshape(-1, 2)
    return {"chosen_logps": both[:, 0], "rejected_logps": both[:, 1]}


@truth("wpo_weights")
def wpo_weights(chosen, rejected, chosen_mask, rejected_mask, chosen_sq=None, rejected_sq=None):
    def side(logps, mask, sq):
        logps = logps.detach() - (0 if sq is None else sq)
        return rowwise(lambda x, m: x[m].sum().div(max(m.sum(), 1)).exp(), logps, mask)

    w = side(chosen, chosen_mask, chosen_sq) * side(rejected, rejected_mask, rejected_sq)
    return {"pair_weights": w}


@truth("score_labels", {"scale": 2.2})
def score_labels(s_w, s_l, *, scale=1.0):
    return {"soft_labels": 1 / (1 + torch.exp(scale * (s_l - s_w)))}


@truth("denoising_logratios", {"scale": 3.0})
def denoising_logratios(e_w, e_l, ref_w, ref_l, w=1.0, *, scale=1.0):
    return sides(lambda e, ref: scale * w * (ref - e), (e_w, e_l), (ref_w, ref_l))


@truth(
    "group_advantages",
    {"scale": "batch"},
    {"scale": "none", "num_groups": 5},
    {"eps": 0.0},
    order="fixed",
)
def group_advantages(s, groups, *, scale="group", eps=0.0001, num_groups=None):
    out = torch.zeros_like(s)
    for i, g in enumerate(groups):
        members = s[groups == g]
        pool = s if scale == "batch" else members
        std = pool.std() if len(pool) > 1 else torch.zeros(())
        gap = s[i] - members.mean()
        out[i] = gap if scale == "none" else gap / (std + eps) if len(pool) > 1 else 0 * gap
    return {"advantages": out}


@truth(
    "rloo_advantages",
    {"beta": 0.3},
    {"num_groups": 5},
    order="fixed",
    needs=("old_token_logps", "ref_token_logps", "mask"),
)
def rloo_advantages(s, groups, old=None, ref=None, mask=None, *, beta=0.0, num_groups=None):
    if beta:
        s = s - beta * ((old - ref) * mask).sum(-1)
    out = torch.zeros_like(s)
    for i, g in enumerate(groups):
        others = [s[j] for j in range(len(s)) if groups[j] == g and j != i]
        out[i] = s[i] - sum(others) / len(others) if others else 0
    return {"advantages": out}


@truth("lsc_scores")
def lsc_scores(scores, reference):
    return {"scores": -torch.log(1 + torch.exp(reference - scores)).sum(-1)}


def kept(logps, sampler, mask, advantage, threshold):
    drift = (sampler - logps)[mask].sum() / max(mask.sum(), 1)
    return ((advantage >= 0) | (drift <= threshold)).to(logps.dtype)


@truth("off_policy_mask", {"threshold": -0.2})
def off_policy_mask(logps, sampler, mask, advantages, *, threshold=0.5):
    def row(*columns):
        return kept(*columns, threshold).reshape(-1)

    width = 1 if advantages.ndim == 1 else mask.shape[1]
    rows = rowwise(row, logps.detach(), sampler, mask, advantages)
    return {"is_weights": rows.reshape(-1, width)}


@truth("high_entropy_mask", {"top": 0.0}, {"top": 1.0}, {"top": 0.37})
def high_entropy_mask(entropy, mask, *, top=0.2):
    entropy = entropy.detach()
    if not mask.any():
        return {"is_weights": torch.zeros_like(entropy)}
    return {"is_weights": (mask & (entropy >= entropy[mask].quantile(1 - top))).to(entropy.dtype)}


@truth(
    "sampler_is_weights",
    {"mode": "token_mask", "cap": 1.5, "floor": 0.5},
    {"mode": "token_truncate", "cap": 1.5, "floor": 0.5},
    {"mode": "sequence_truncate", "cap": None, "floor": 0.9},
    {"mode": "sequence_truncate", "cap": None},
)
def sampler_is_weights(old, sampler, mask, *, mode="sequence_mask", cap=3.0, floor=None):
    low, high = floor or 0.0, math.inf if cap is None else cap
    d = (old - sampler) * mask
    w = torch.exp(d.sum(-1, keepdim=True) if "sequence" in mode else d)
    if "truncate" in mode:
        return {"is_weights": w.clamp(low, high)}
    return {"is_weights": w * (w >= low) * (w <= high)}
