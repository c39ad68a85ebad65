"""Truths of the token-level pairs: one pair at a time, over the tokens its masks select."""

import torch
from _objective_truth import loss, truth

WEIGHTS = ("chosen_token_weights", "rejected_token_weights")


def pairwise(function, *columns):
    """Stack function(row) over the rows of the columns; an empty batch has an empty result."""
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return torch.stack(rows) if rows else columns[0].sum(-1)


@truth("ld_dpo", {"beta": 0.7, "ld_alpha": 0.0}, {"ld_alpha": 1.0})
def ld_dpo(c, r, c0, r0, c_mask, r_mask, *, beta=0.1, ld_alpha=0.5):
    def row(c, r, c0, r0, c_mask, r_mask):
        chosen, rejected = (c - c0)[c_mask], (r - r0)[r_mask]
        m = min(len(chosen), len(rejected))
        a, b = (x[:m].sum() + ld_alpha * x[m:].sum() for x in (chosen, rejected))
        return loss(beta * (a - b))

    return pairwise(row, c, r, c0, r0, c_mask, r_mask)


@truth("wpo", {"beta": 0.5}, detaches=True)
def wpo(c, r, c0, r0, c_mask, r_mask, c_sq=None, r_sq=None, *, beta=0.1):
    c_sq, r_sq = (0 * x if sq is None else sq for x, sq in ((c0, c_sq), (r0, r_sq)))

    def row(c, r, c0, r0, c_mask, r_mask, c_sq, r_sq):
        weight = 1
        for logps, sq, mask in ((c, c_sq, c_mask), (r, r_sq, r_mask)):
            n = max(mask.sum(), 1)
            weight = weight * torch.exp((logps.detach() - sq)[mask].sum() / n)
        return weight * loss(beta * ((c - c0)[c_mask].sum() - (r - r0)[r_mask].sum()))

    return pairwise(row, c, r, c0, r0, c_mask, r_mask, c_sq, r_sq)


@truth("mask_dpo", {"beta": 0.7}, gradient_into=WEIGHTS)
def mask_dpo(c, r, c0, r0, c_mask, r_mask, c_weights, r_weights, *, beta=0.1):
    def row(c, r, c0, r0, c_mask, r_mask, c_weights, r_weights):
        a = (c_weights * (c - c0))[c_mask].sum()
        return loss(beta * (a - (r_weights * (r - r0))[r_mask].sum()))

    return pairwise(row, c, r, c0, r0, c_mask, r_mask, c_weights, r_weights)


@truth(
    "dpo_bmc",
    {"beta": 0.7, "delta": 5.0},
    {"beta": 0.3, "ref_weighting": "own"},
    detaches=True,
)
def dpo_bmc(
    c,
    r,
    c0,
    r0,
    c_mask,
    r_mask,
    c_flags,
    r_flags,
    *,
    beta=0.01,
    delta=2.0,
    ref_weighting="policy",
):
    def side(logps, ref, mask, flags):
        total = 0 * logps.sum()
        for x, x0, d in zip(logps[mask], ref[mask], flags[mask], strict=True):
            m = 1 + d * min(1 / torch.exp(x.detach()), torch.tensor(delta, dtype=x.dtype))
            m0 = 1 + d * min(1 / torch.exp(x0), torch.tensor(delta, dtype=x.dtype))
            total = total + m * x - (m0 if ref_weighting == "own" else m) * x0
        return total

    def row(c, r, c0, r0, c_mask, r_mask, c_flags, r_flags):
        return loss(beta * (side(c, c0, c_mask, c_flags) - side(r, r0, r_mask, r_flags)))

    return pairwise(row, c, r, c0, r0, c_mask, r_mask, c_flags, r_flags)


@truth(
    "sparse_po",
    {"beta": 0.3, "lambda_u": 0.7, "lambda_d": 0.4},
    {"lambda_u": 0.0, "lambda_d": 0.0},
    gradient_into=(*WEIGHTS, "chosen_kl_weights", "rejected_kl_weights"),
)
def sparse_po(
    c,
    r,
    c0,
    r0,
    c_mask,
    r_mask,
    c_weights,
    r_weights,
    c_kl,
    r_kl,
    c_kl_weights=None,
    r_kl_weights=None,
    *,
    beta=0.1,
    lambda_u=0.001,
    lambda_d=0.001,
):
    c_k = c_weights if c_kl_weights is None else c_kl_weights
    r_k = r_weights if r_kl_weights is None else r_kl_weights

    def side(logps, ref, mask, w, kl, k):
        u = (w * (logps - ref))[mask].sum()
        return u, (k * kl)[mask].sum(), w[mask].abs().sum(), k[mask].abs().sum()

    def row(*columns):
        u_c, d_c, w_c, k_c = side(*columns[::2])
        u_r, d_r, w_r, k_r = side(*columns[1::2])
        z = beta * (u_c - u_r - (d_r - d_c))
        return loss(z) + lambda_u * (w_c + w_r) + lambda_d * (k_c + k_r)

    sides = (c, r, c0, r0, c_mask, r_mask, c_weights, r_weights, c_kl, r_kl, c_k, r_k)
    return pairwise(row, *sides)


@truth("tdpo", {"beta": 0.7, "alpha": 0.3}, {"version": 1, "beta": 0.3}, detaches=True)
def tdpo(a, b, c_kl, r_kl, c_mask, r_mask, *, beta=0.1, alpha=0.5, version=2):
    c_kl, r_kl = (c_kl * c_mask).sum(-1), (r_kl * r_mask).sum(-1)
    if version == 1:
        return loss(beta * (a - b - (r_kl - c_kl)))
    return loss(beta * (a - b - alpha * (r_kl - c_kl.detach())))


@truth("rrpo", {"beta": 0.7, "alpha": 0.3})
def rrpo(c, r, c0, r0, c_mask, r_mask, c_phrase, r_phrase, kl, *, beta=0.1, alpha=0.01):
    def row(c, r, c0, r0, c_mask, r_mask, c_phrase, r_phrase, kl):
        a = (c - c0)[c_mask][c_phrase[c_mask] != -1].sum()
        b = (r - r0)[r_mask][r_phrase[r_mask] != -1].sum()
        return loss(beta * (a - b)) + alpha * kl[c_mask].sum()

    return pairwise(row, c, r, c0, r0, c_mask, r_mask, c_phrase, r_phrase, kl)


@truth("opa_dpo", {"beta": 0.7}, {"level": "sequence", "beta": 0.3})
def opa_dpo(c, r, c0, r0, c_mask, r_mask, c_w=None, r_w=None, *, beta=0.1, level="token"):
    c_w, r_w = (torch.ones_like(x) if w is None else w for x, w in ((c0, c_w), (r0, r_w)))

    def row(c, r, c0, r0, c_mask, r_mask, c_w, r_w):
        a, b = c_w * (c - c0), r_w * (r - r0)
        if level == "sequence":
            return loss(beta * (a[c_mask].sum() - b[r_mask].sum()))
        both = [t for t in range(len(c)) if c_mask[t] and r_mask[t]]
        return sum((loss(beta * (a[t] - b[t])) for t in both), 0 * a.sum()) / max(len(both), 1)

    return pairwise(row, c, r, c0, r0, c_mask, r_mask, c_w, r_w)


@truth(
    "pairwise_cringe",
    {"alpha": 0.7, "bias": 0.5, "tau": 2.0},
    {"alpha": 0.7, "bias": 0.5, "tau": 2.0, "detach_gate": True},
    detaches=True,
)
def pairwise_cringe(
    c, r, tokens, others, mask, *, alpha=0.005, bias=-10.0, tau=10.0, detach_gate=False
):
    def row(c, r, tokens, others, mask):
        gate = torch.sigmoid((bias - c + r) / tau)
        gate = gate.detach() if detach_gate else gate
        # Against one other word: -log p_other / (p_other + p_token).
        p, q = torch.exp(others[mask]), torch.exp(tokens[mask])
        return gate * (-c - alpha * torch.log(p / (p + q)).sum())

    return pairwise(row, c, r, tokens, others, mask)
