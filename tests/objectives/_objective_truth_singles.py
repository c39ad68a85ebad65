"""Truths of the single responses: row by row, token by token."""

import torch
from _objective_truth import log_sigmoid, loss, nll_of, truth


def rowwise(function, *columns):
    """Stack function(row) over the rows of the columns; an empty batch has an empty result."""
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return torch.stack(rows) if rows else columns[0].sum(-1)


@truth("weighted_nll", {"reduction": "sum"}, {"reduction": "batch"})
def weighted_nll(logps, n, weights, *, reduction="mean"):
    return weights * nll_of(logps, n, reduction)


@truth("dft", detaches=True)
def dft(logps, mask):
    scored = max(sum(len(x[m]) for x, m in zip(logps, mask, strict=True)), 1)
    scale = len(logps) / scored
    return rowwise(lambda x, m: -scale * (x[m].exp().detach() * x[m]).sum(), logps, mask)


def ift_row(logps, gamma, detached):
    losses = [-x for x in logps]
    weights = [
        sum(gamma ** (k - t) * losses[k] for k in range(t, len(losses))) for t in range(len(losses))
    ]
    weights = [w.detach() if detached else w for w in weights]
    if not losses:
        return logps.sum()
    top = sum(w * x for w, x in zip(weights, losses, strict=True))
    return top / max(sum(weights), 1e-12)


@truth("ift", {"gamma": 0.0}, {"gamma": 1.0}, {"detach_weights": True}, detaches=True)
def ift(logps, mask, *, gamma=0.95, detach_weights=False):
    return rowwise(lambda x, m: ift_row(x[m], gamma, detach_weights), logps, mask)


@truth(
    "preference_guided_mle",
    {"to_go": True, "entropy_coef": 0.3},
    {"entropy_coef": 1.0},
    needs=("entropy",),
)
def preference_guided_mle(logps, mask, weights, entropy=None, *, to_go=False, entropy_coef=0.0):
    def row(x, m, g, h=None):
        x, g = x[m], g[m]
        if to_go:
            g = torch.stack([g[t:].sum() for t in range(len(g))]) if len(g) else g
        shares = g / g.sum() if g.sum() != 0 else 0 * g
        first = -(shares * x).sum()
        return first - entropy_coef * h[m].sum() if entropy_coef else first

    return rowwise(row, logps, mask, weights, *([] if entropy is None else [entropy]))


@truth("bco", {"beta": 0.7, "delta": 0.4})
def bco(x, labels, *, beta=0.1, delta=0.0):
    reward = beta * x - delta
    return labels * loss(reward) + ~labels * loss(-reward)


@truth(
    "depo",
    {"beta": 0.7, "alpha_token": 0.5, "alpha_step": 2.0},
    {"desirable_weight": 0.5, "undesirable_weight": 2.0, "alpha_token": 0.0, "alpha_step": 0.0},
)
def depo(
    x,
    labels,
    kl,
    lengths,
    steps,
    *,
    beta=0.1,
    alpha_token=1.0,
    alpha_step=1.0,
    desirable_weight=1.0,
    undesirable_weight=1.0,
):
    z0 = max(kl.mean().item(), 0.0) if len(kl) else 0.0

    def row(x, label, n, s):
        steps = max(s.item(), 1)
        tokens = max(n.item() / steps, 1)
        bonus = alpha_token / tokens + alpha_step / steps
        if label:
            return desirable_weight * torch.sigmoid(-(beta * (x - z0) + bonus))
        return undesirable_weight * torch.sigmoid(-beta * (z0 - x))

    rows = [row(*columns) for columns in zip(x, labels, lengths, steps, strict=True)]
    return torch.stack(rows) if rows else 0 * x


@truth("ulma", {"beta": 0.7})
def ulma(logps, x, labels, *, beta=0.1):
    return labels * -logps + ~labels * -log_sigmoid(-beta * x)


@truth("pointwise_dpo", {"beta": 0.7})
def pointwise_dpo(x, z, *, beta=0.1):
    z = z.to(x.dtype)
    return -z * log_sigmoid(beta * x) - (1 - z) * log_sigmoid(-beta * x)


@truth("pmpo", {"alpha": 0.0}, {"alpha": 1.0, "beta": 0.2}, {"beta": 0.0}, always=("forward_kl",))
def pmpo(logps, labels, kl, *, alpha=0.5, beta=0.5):
    good, n = labels.sum().item(), len(labels)
    up = -alpha * n / max(good, 1) * logps
    down = (1 - alpha) * n / max(n - good, 1) * logps
    return labels * up + ~labels * down + beta * kl


@truth("gpo", {"beta": 0.7})
def gpo(x, scores, *, beta=0.001):
    return (x - scores / beta) ** 2


@truth("a2po", {"beta": 0.7})
def a2po(x, scores, values, *, beta=0.001):
    return (beta * x - (scores - values)) ** 2
