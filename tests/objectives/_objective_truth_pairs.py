"""Truths of the pairs that read log-ratios, log-probabilities, scores or a third sequence."""

import torch
from _objective_truth import log_sigmoid, loss, nll_of, per_token, truth


def shaped(x, alpha):
    """(1 - p^-alpha)/alpha: the alpha divergence's score and AlphaPO's reward."""
    return (1 - torch.exp(x) ** -alpha) / alpha if abs(alpha) >= 1e-6 else x


@truth(
    "f_dpo",
    {"divergence": "forward_kl", "beta": 0.7},
    {"divergence": "js"},
    {"divergence": "alpha", "alpha": -0.7},
    {"divergence": "alpha"},
    {"divergence": "alpha", "alpha": 0.0},
)
def f_dpo(a, b, *, beta=0.1, divergence="reverse_kl", alpha=0.5):
    if divergence == "js":
        a, b = (torch.log(2 * torch.exp(x) / (1 + torch.exp(x))) for x in (a, b))
    elif divergence != "reverse_kl":
        a, b = (shaped(x, alpha if divergence == "alpha" else 1.0) for x in (a, b))
    return loss(beta * (a - b))


@truth("lcpo", {"beta": 0.7, "eta": 0.3}, {"base": "ipo", "beta": 0.7}, detaches=True)
def lcpo(a, b, *, beta=0.1, eta=0.9, base="dpo"):
    if base == "dpo":
        given, other = loss(beta * (a - b)), loss(beta * (b - a))
    else:
        given, other = (a - b - 0.5 / beta) ** 2, (b - a - 0.5 / beta) ** 2
    # Bayes: the likelihood of a label is exp(-loss).
    w = eta * torch.exp(other - given) / (eta * torch.exp(other - given) + 1 - eta)
    w = w.detach()
    return w * given + (1 - w) * other


@truth("flex_dpo", {"beta_chosen": 0.5, "beta_rejected": 0.7})
def flex_dpo(a, b, *, beta_chosen=0.1, beta_rejected=0.05):
    return loss(beta_chosen * a - beta_rejected * b)


@truth("focalpo", {"beta": 0.7, "gamma": 2.0}, {"gamma": 0.0})
def focalpo(a, b, *, beta=0.1, gamma=0.05):
    win = torch.sigmoid(beta * (a - b))
    return -(win**gamma) * torch.log(win)


@truth("dpo_sft", {"beta": 0.7, "sft_weight": 0.2, "sft_reduction": "batch"})
def dpo_sft(a, b, c, n_c, *, beta=0.1, sft_weight=1.0, sft_reduction="mean"):
    return loss(beta * (a - b)) + sft_weight * nll_of(c, n_c, sft_reduction)


@truth("sppo", {"beta": 0.7})
def sppo(a, b, s_w, s_l, *, beta=0.001):
    return ((a - (s_w - 0.5) / beta) ** 2 + (b - (s_l - 0.5) / beta) ** 2) / 2


@truth("odpo", {"beta": 0.7, "alpha": 0.3}, {"kind": "linear"}, {"kind": "linear", "alpha": 0.0})
def odpo(a, b, s_w, s_l, *, beta=0.1, alpha=1.0, kind="log"):
    rows = []
    for delta, g in zip(a - b, s_w - s_l, strict=True):
        if kind == "linear":
            rows.append(loss(beta * delta - alpha * g))
        else:
            rows.append(loss(beta * delta - alpha * torch.log(g)) if g > 0 else 0 * delta)
    return torch.stack(rows) if rows else a


@truth("modpo", {"beta": 0.7, "w0": 1.5})
def modpo(a, b, s_w, s_l, *, beta=0.1, w0=0.5):
    return loss((beta * (a - b) - (s_w - s_l)) / w0)


@truth("mappo", {"beta": 0.7})
def mappo(a, b, s_w, s_l, *, beta=0.1):
    return loss(beta * a - (s_w - s_l) * beta * b)


@truth("mmpo", {"beta": 0.7, "label_scale": 1.0}, {"label_scale": 0.0})
def mmpo(a, b, s_w, s_l, *, beta=0.1, label_scale=2.2):
    better, worse = torch.exp(label_scale * s_w), torch.exp(label_scale * s_l)
    return loss(beta * (a - b), better / (better + worse))


@truth("mcts_dpo", {"beta": 0.7})
def mcts_dpo(a, b, s_w, s_l, *, beta=0.1):
    rows = []
    for delta, w, l in zip(a - b, s_w.tolist(), s_l.tolist(), strict=True):
        confidence = 1 / (1 + max(l, 0.0) / max(1.0, w))
        rows.append(loss(beta * delta, 1 - min(1 - confidence, 0.5)))
    return torch.stack(rows) if rows else a


@truth("online_ipo", {"beta": 0.7})
def online_ipo(a, b, p, *, beta=0.1):
    return (a - b - (p - 0.5) / beta) ** 2


@truth("egpo", {"beta": 0.7})
def egpo(a, b, s_w, s_l, *, beta=0.1):
    return (a - b - (s_w - s_l) / beta) ** 2


@truth("copg", {"beta": 0.7})
def copg(a, b, s_w, s_l, *, beta=0.1):
    return ((s_w - beta * a) - (s_l - beta * b)) ** 2 / (2 * beta)


@truth("online_dpo", {"beta": 0.7, "loss": "ipo"}, {"beta": 0.7})
def online_dpo(a, b, s_w, s_l, *, beta=0.1, loss="sigmoid"):
    delta = (2.0 * (s_w >= s_l) - 1) * (a - b)
    return (delta - 0.5 / beta) ** 2 if loss == "ipo" else -log_sigmoid(beta * delta)


@truth("hypo", {"beta": 0.7, "lam": 0.3}, detaches=True)
def hypo(a, b, y, y0, *, beta=0.1, lam=0.0001):
    return loss(beta * (a - b)) + lam * (y.detach() - y0) * y


@truth("vpo", {"beta": 0.7, "alpha": 0.3}, {"online": False, "alpha": 2.0})
def vpo(a, b, y, y0, *, beta=0.1, alpha=0.01, online=True):
    return loss(beta * (a - b)) + (1 if online else -1) * alpha * beta * (y - y0)


@truth("rationale_dpo", {"beta": 0.7, "gamma": 0.3}, {"form": "logistic", "gamma": 0.7})
def rationale_dpo(a, b, y, *, beta=0.1, gamma=0.1, form="nll"):
    return loss(beta * (a - b)) + (loss(gamma * y) if form == "logistic" else -gamma * y)


@truth(
    "rdpo_visual",
    {"beta": 0.7, "image_weight": 0.3},
    {"image_weight": 1.0, "anchor_weight": 1.0, "anchor": 0.4},
)
def rdpo_visual(a, b, y, y0, *, beta=0.1, image_weight=1.0, anchor_weight=0.0, anchor=0.0):
    image = image_weight * loss(beta * a - beta * (y - y0))
    return loss(beta * (a - b)) + image + anchor_weight * loss(beta * a - anchor)


@truth(
    "tpo_triple",
    {"beta": 0.7, "alpha": 0.3, "label_smoothing": 0.1, "sft_reduction": "batch"},
    {"sft_reduction": "sum"},
)
def tpo_triple(c, r, y, n_y, *, beta=0.01, alpha=1.0, label_smoothing=0.0, sft_reduction="mean"):
    return loss(beta * (c - r), 1 - label_smoothing) + alpha * nll_of(y, n_y, sft_reduction)


@truth(
    "tpo_triple_l",
    {"beta": 2.0, "gamma": -0.3, "alpha": 0.3, "label_smoothing": 0.1, "sft_reduction": "batch"},
)
def tpo_triple_l(
    c,
    r,
    n_c,
    n_r,
    y,
    n_y,
    *,
    beta=0.01,
    gamma=0.5,
    alpha=1.0,
    label_smoothing=0.0,
    sft_reduction="mean",
):
    z = beta * (per_token(c, n_c) - per_token(r, n_r)) - gamma
    return loss(z, 1 - label_smoothing) + alpha * nll_of(y, n_y, sft_reduction)


@truth("typo", {"lam": 0.7})
def typo(c, r, y, y0, *, lam=0.1):
    return loss(c - r) + lam * (y0 - y)


@truth(
    "alphapo",
    {"beta": 0.7, "gamma": -0.4, "alpha": -0.5, "label_smoothing": 0.1},
    {"alpha": 0.0},
)
def alphapo(c, r, n_c, n_r, *, beta=2.5, gamma=0.25, alpha=0.25, label_smoothing=0.0):
    c, r = (shaped(per_token(x, n), alpha) for x, n in ((c, n_c), (r, n_r)))
    return loss(beta * (c - r) - gamma, 1 - label_smoothing)


@truth("asft_aligned", {"lam": 0.7})
def asft_aligned(c, r, n_c, n_r, *, lam=0.1):
    c, r = per_token(c, n_c), per_token(r, n_r)
    return -c + lam * (-c - torch.log(1 - torch.exp(torch.clamp(r, max=-1e-6))))


LOGIC = {  # numerator, denominator; p, q: probabilities of chosen and rejected
    "ce": lambda p, q: (p, 1 - p),
    "ce_unl": lambda p, q: (p * (1 - q), q + (1 - p) * (1 - q)),
    "cpo": lambda p, q: (p, q),
    "orpo": lambda p, q: (p * (1 - q), q * (1 - p)),
    "ccpo": lambda p, q: (p, (1 - p) * q),
    "cfunl": lambda p, q: (1 - q, (1 - p) * q),
    "uncpo": lambda p, q: (p * q + (1 - q), q * (1 - p)),
    "qfunl": lambda p, q: (1 - q, q),
}


@truth("dpa_logic", *({"variant": variant, "beta": 0.7} for variant in LOGIC))
def dpa_logic(c, r, n_c, n_r, *, variant="ccpo", beta=1.0):
    p, q = (torch.exp(per_token(x, n).clamp(max=-1e-6)) for x, n in ((c, n_c), (r, n_r)))
    above, below = LOGIC[variant](p, q)
    return loss(beta * torch.log(above / below))
