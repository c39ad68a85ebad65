"""Truths of the groups: group by group, rank by rank, pair by pair."""

import math

import torch
from _objective_truth import log_sigmoid, loss, per_token, truth


def by_group(function, groups, num_groups, *columns):
    """Stack function(columns of a group) over the groups; a group without rows gives 0."""
    count, zero = num_groups or int(max(groups.tolist(), default=-1)) + 1, 0 * columns[0].sum()
    inside = [groups == g for g in range(count)]
    rows = [function(*(x[at] for x in columns)) if at.any() else zero for at in inside]
    return torch.stack(rows) if rows else zero[None][:0]


def ranking(scores):
    """Row numbers from the best to the worst; sorted() keeps equal ones in row order."""
    return sorted(range(len(scores)), key=lambda k: -scores[k])


def better_pairs(scores):
    """(i, j) with S_i > S_j."""
    n = range(len(scores))
    return [(i, j) for i in n for j in n if scores[i] > scores[j]]


def log_of_sum(terms):
    return torch.log(sum(map(torch.exp, terms)))


@truth(
    "infonca",
    {"beta": 0.7, "alpha": 1.5},
    {"alpha": 1.5, "subtract_entropy": True, "num_groups": 5},
    order="fixed",
)
def infonca(x, s, groups, *, beta=0.1, alpha=0.01, subtract_entropy=False, num_groups=None):
    def row(x, s):
        q = torch.softmax(s / alpha, 0)
        kl = -(q * torch.log(torch.softmax(beta * x, 0))).sum()
        return kl + (torch.xlogy(q, q).sum() if subtract_entropy else 0)

    return by_group(row, groups, num_groups, x, s)


@truth("nca", {"beta": 0.7, "alpha": 1.5}, {"num_groups": 5}, order="fixed")
def nca(x, s, groups, *, beta=0.1, alpha=0.01, num_groups=None):
    def row(x, s):
        q = torch.softmax(s / alpha, 0)
        return -(q * log_sigmoid(beta * x) + log_sigmoid(-beta * x) / len(x)).sum()

    return by_group(row, groups, num_groups, x, s)


@truth("dpo_plackett_luce", {"beta": 0.7}, {"num_groups": 5}, order="fixed")
def dpo_plackett_luce(x, s, groups, *, beta=0.1, num_groups=None):
    def row(x, s):
        h = beta * x[ranking(s)]
        return sum(log_of_sum(h[k:]) - h[k] for k in range(len(h)))

    return by_group(row, groups, num_groups, x, s)


@truth(
    "swepo",
    {"beta": 0.7, "power": 2},
    {"alpha": 0.0, "num_groups": 5},
    {"alpha": 0.3, "power": 0.5},
    order="fixed",
)
def swepo(x, s, groups, *, beta=0.1, alpha=1.0, power=1, num_groups=None):
    def row(x, s):
        gap = s - s.sum() / len(s)
        weight = torch.exp(beta * x + alpha * gap.abs() ** power)
        if len(s) == 1 or (s == s[0]).all():
            return 0 * x.sum()
        return -torch.log(weight[gap > 0].sum() / weight.sum())

    return by_group(row, groups, num_groups, x, s)


@truth("pro_ranking", {"sft_weight": 0.7}, {"num_groups": 5}, order="fixed")
def pro_ranking(logps, n, s, groups, *, sft_weight=0.05, num_groups=None):
    def row(logps, mean, s):
        order = ranking(s)
        logps, mean, s = logps[order], mean[order], s[order]
        last = len(s) - 1
        total = -sft_weight * last**2 * logps[0]
        for k in range(last):
            later = range(k + 1, last + 1)
            own = mean[k] * max(s[k] - s[i] for i in later)
            total = total + log_of_sum([own, *(mean[i] * (s[k] - s[i]) for i in later)]) - own
        return total

    return by_group(row, groups, num_groups, logps, per_token(logps, n), s)


@truth(
    "aft",
    {"beta": 0.7, "num_groups": 5},
    {"beta": 0.0},
    {"variant": "plain"},
    {"variant": "detached"},
    order="fixed",
    detaches=True,
)
def aft(logps, n, s, groups, *, variant="boundary", beta=0.1, num_groups=None):
    def row(mean, s):
        pairs, total = better_pairs(s), 1.0
        for i, j in pairs:
            down = mean[j].detach() if variant == "detached" else mean[j]
            total = total + torch.exp(down - mean[i])
            if variant == "boundary":
                bound = min(mean[a] for a, b in pairs if b == j).detach() - 2 * beta
                total = total + torch.exp(bound - mean[j])
        contrast = torch.log(total) if pairs else 0
        return contrast - mean[s == s.max()].sum() / (s == s.max()).sum()

    return by_group(row, groups, num_groups, per_token(logps, n), s)


@truth(
    "knowpat",
    {"lam": 0.7, "length_power": 0.5},
    {"lam": 1.0, "num_groups": 5},
    order="fixed",
    detaches=True,
)
def knowpat(logps, n, scores, groups, *, lam=0.01, length_power=1.0, num_groups=None):
    def row(logps, n, scores):
        order = ranking(scores)
        logps, n = logps[order], n[order].clamp(min=1).to(logps.dtype)
        s, last = logps / n**length_power, len(n) - 1
        const = s.detach()
        spread = const.max() - const.min()
        total = 0
        for k in range(last):
            w = (const[k] - const.min()) / spread if spread > 0 else 0
            worse = sum(loss(-s[j]) for j in range(k + 1, last + 1)) / (last - k)
            total = total + lam / last * w * (loss(s[k]) + worse)
        return total - logps[0] / n[0]

    return by_group(row, groups, num_groups, logps, n, scores)


@truth(
    "trpa",
    {"beta": 0.7, "top_score": 0.3, "kl_coef": 0.5},
    {"top_factor": 1.5, "top_score": -1.0, "num_groups": 5},
    order="fixed",
)
def trpa(
    logp, old, ref, mask, s, groups, *, beta=0.1, top_score=1.0, top_factor=2.5, kl_coef=0.001,
    num_groups=None,
):  # fmt: skip
    rho = ((logp - ref) * mask).sum(1) / mask.sum(1).clamp(min=1)
    k3 = torch.where(mask, torch.exp(old - logp) - 1 - (old - logp), 0)
    pairs = [(i, j) for i, j in better_pairs(s) if groups[i] == groups[j]]
    ids = num_groups or int(max(groups.tolist(), default=-1)) + 1
    rows = []
    for g in range(ids):
        total = kl_coef * k3[groups == g].sum() / max(mask.sum(), 1)
        for i, j in pairs:
            if groups[i] == g:
                f = top_factor if s[i] >= top_score else 1
                total = total + loss(f * beta * (rho[i] - rho[j])) / len(pairs)
        rows.append(ids * total)
    return torch.stack(rows) if rows else rho


@truth(
    "lambda_rank",
    {"beta": 2.0, "num_groups": 5},
    {"rank_by": "model"},
    order="fixed",
    detaches=True,
)
def lambda_rank(x, s, groups, *, beta=0.5, rank_by="scores", num_groups=None):
    def row(x, s):
        order = ranking(s if rank_by == "scores" else x.detach())
        discount = [1 / math.log(2 + order.index(i)) for i in range(len(x))]
        total = 0 * x.sum()
        for i, j in better_pairs(s):
            weight = abs(2 ** s[i] - 2 ** s[j]) * abs(discount[i] - discount[j])
            total = total + weight * loss(beta * (x[i] - x[j]))
        return total

    return by_group(row, groups, num_groups, x, s)


@truth("mdpo_multisample", {"loss": "ipo", "beta": 0.7}, {"num_groups": 5}, order="fixed")
def mdpo_multisample(x, labels, groups, *, beta=0.1, loss="sigmoid", num_groups=None):
    def row(x, labels):
        if labels.all() or not labels.any():
            return 0 * x.sum()
        m = x[labels].mean() - x[~labels].mean()
        return -log_sigmoid(beta * m) if loss == "sigmoid" else (m - 0.5 / beta) ** 2

    return by_group(row, groups, num_groups, x, labels)


@truth("brain", {"temperature": 0.3}, {"num_groups": 5}, order="fixed")
def brain(logps, ref, sampler, s, groups, *, temperature=1.0, num_groups=None):
    def row(logps, ref, sampler, s):
        a = torch.exp(s / temperature + ref - sampler)
        b = torch.exp(logps - sampler)
        a, b = a / a.sum(), b / b.sum()
        return (a * torch.log(a / b)).sum()

    return by_group(row, groups, num_groups, logps, ref, sampler, s)
