"""Truths of the pairs that read several models, or the rest of the batch: pair by pair."""

import torch
from _objective_truth import loss, per_token, truth


def rows_of(x, function):
    """Stack function(i) over the batch of x; an empty batch has an empty result."""
    return torch.stack([function(i) for i in range(len(x))]) if len(x) else x


@truth("spa", {"beta": 0.7, "alpha": 0.4, "threshold": 0.2}, {"alpha": 1.0, "threshold": -0.1})
def spa(a, b, mixed_c, mixed_r, c0, r0, *, beta=0.1, alpha=0.1, threshold=0.0):
    g = beta * ((mixed_c - mixed_r) - (c0 - r0))
    label = torch.ones_like(g)
    label[g <= threshold] = 1 - alpha
    return loss(beta * (a - b), label)


@truth(
    "mnpo",
    {"ratio": 0.6, "eta": 0.7, "history_weights": [1.0, 0.0, 2.5]},
    {"ratio": 1.0},
)
def mnpo(c, r, c0, r0, past_c, past_r, *, ratio=1 / 3, eta=0.0075, history_weights=None):
    weights = torch.tensor(history_weights or [1.0] * len(past_c)).to(c)
    past = ((weights / weights.sum())[:, None] * (past_c - past_r)).sum(0)
    h = (c - r) - ratio * (c0 - r0) - (1 - ratio) * past
    return (h - 0.5 / eta) ** 2


@truth("inpo", {"ratio": 0.6, "eta": 0.7}, {"ratio": 0.0})
def inpo(c, r, c0, r0, prev_c, prev_r, *, ratio=1 / 3, eta=0.0075):
    h = (c - r) - ratio * (c0 - r0) - (1 - ratio) * (prev_c - prev_r)
    return (h - 0.5 / eta) ** 2


@truth("apo_accelerated", {"beta": 0.7, "alpha": 0.0}, {"alpha": 1.5}, sizes={"K": 2})
def apo_accelerated(c, r, past_c, past_r, *, beta=0.1, alpha=0.3):
    ref_c, ref_r = (past[0] + alpha * (past[0] - past[1]) for past in (past_c, past_r))
    return loss(beta * ((c - ref_c) - (r - ref_r)))


@truth(
    "mrpo",
    {"beta": 0.7, "clip": None},
    {"weights": [1, 0, 3.0], "clip": 0.5},
    {"weights": [0.2, 0.3, 0.5], "clip": 0.0},
)
def mrpo(c, r, past_c, past_r, *, beta=0.1, weights=None, clip=0.1):
    def row(i):
        w = weights
        if w is None:
            w = [abs(x) for x in (past_c[:, i] - past_r[:, i]).tolist()]
        w = w if sum(w) > 0 else [1.0] * len(w)
        refs = []
        for past in (past_c[:, i], past_r[:, i]):
            near = list(past)
            if clip is not None:
                near[1:] = [x.clamp(past[0] * (1 + clip), past[0] * (1 - clip)) for x in near[1:]]
            harmonic = sum(share / sum(w) / torch.exp(x) for share, x in zip(w, near, strict=True))
            refs.append(torch.log(1 / harmonic))
        return loss(beta * ((c[i] - refs[0]) - (r[i] - refs[1])))

    return rows_of(c, row)


@truth("rpo_relative", {"beta": 0.7, "tau": 1.5})
def rpo_relative(a, b, e, *, beta=0.1, tau=0.5):
    def distance(x, y):
        return 1 - x @ y / (x.norm().clamp(min=1e-8) * y.norm().clamp(min=1e-8))

    def row(i):
        near = torch.stack([torch.exp(-distance(e[i], other) / tau) for other in e])
        return loss(beta * near / near.sum() * (a[i] - b)).mean()

    return rows_of(a, row)


@truth(
    "sspo",
    {"beta": 0.7, "gamma": -0.3, "weight": 0.2, "prior": 0.8, "mean": -0.4, "std": 0.5},
    {"clip": 0.2},
)
def sspo(
    c,
    r,
    n_c,
    n_r,
    u,
    n_u,
    *,
    beta=2.0,
    gamma=1.0,
    weight=0.5,
    prior=0.5,
    mean=0.0,
    std=1.0,
    clip=5.0,
):
    def standard(x, n):
        return torch.clamp((per_token(x, n) - mean) / std, -clip, clip)

    if len(c) == 0:
        return c
    threshold, total = standard(c, n_c).min(), 0 * c[0]
    for z in beta * (standard(u, n_u) - threshold):
        total = total + (prior * loss(z) if z > 0 else (1 - prior) * loss(-z))
    pairs = loss(beta * (per_token(c, n_c) - per_token(r, n_r)) - gamma)
    return weight * pairs + (1 - weight) * total / max(len(u), 1)
