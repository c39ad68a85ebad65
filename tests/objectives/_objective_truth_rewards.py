"""Truths of the reward models: row by row, group by group."""

import torch
from _objective_truth import log_sigmoid, loss, truth

VECTORS = {"chosen_rewards": 1, "rejected_rewards": 1}


@truth("bt", {"center_coef": 0.3})
def bt(w, l, margins=0, soft_labels=1, *, center_coef=0.0):
    return loss(w - l - margins, soft_labels) + center_coef * (w + l) ** 2


@truth("bt_ties", {"theta": 1.5})
def bt_ties(w, l, ties, *, theta=5.0):
    p, q = torch.exp(w), torch.exp(l)  # strengths
    win = p / (p + theta * q)
    tie = (theta**2 - 1) * p * q / ((p + theta * q) * (q + theta * p))
    return -torch.log(torch.where(ties, tie, win))


@truth("eurus_rm")
def eurus_rm(w, l):
    return loss(w - l) + loss(w) + loss(-l)


@truth("gpm", {"tau": 1.0, "margin": -0.4}, forms=VECTORS)
def gpm(w, l, eigenvalues=None, *, tau=0.1, margin=0.0):
    s = 0 * w[:, 0]
    for i in range(w.shape[1] // 2):
        plane = w[:, 2 * i] * l[:, 2 * i + 1] - w[:, 2 * i + 1] * l[:, 2 * i]
        s = s + plane * (1 if eigenvalues is None else eigenvalues[:, i])
    return loss((s - margin) / tau)


@truth("pal", {"loss": "hinge"}, forms=VECTORS)
def pal(w, l, anchors, *, loss="logistic"):
    d = ((l - anchors) ** 2).sum(-1) - ((w - anchors) ** 2).sum(-1)
    return torch.clamp(1 - d, min=0) if loss == "hinge" else -log_sigmoid(d)


@truth("lore", forms=VECTORS)
def lore(w, l, users):
    return loss((users * w).sum(-1) - (users * l).sum(-1))


@truth("vpl", {"kl_coef": 0.7})
def vpl(w, l, mean, logvar, *, kl_coef=0.0001):
    return loss(w - l) + kl_coef / 2 * (mean**2 + torch.exp(logvar) - 1 - logvar).sum(-1)


@truth("maxmin_rm", {"num_groups": 5}, forms=VECTORS, order="fixed")
def maxmin_rm(w, l, groups, *, num_groups=None):
    rows = loss(w - l)
    out = []
    for i, g in enumerate(groups.tolist()):
        totals = [rows[groups == g, head].sum().item() for head in range(w.shape[1])]
        out.append(rows[i, totals.index(min(totals))])
    return torch.stack(out) if out else w.sum(-1)


@truth("contextual_quality", {"num_groups": 5}, order="fixed")
def contextual_quality(rewards, labels, groups, *, num_groups=None):
    out = []
    for g in range(num_groups or (groups.max().item() + 1 if len(groups) else 0)):
        r, chosen = rewards[groups == g], rewards[(groups == g) & labels]
        out.append(torch.log(1 + torch.exp(r).sum()) - chosen.sum() / max(len(chosen), 1))
    return torch.stack(out) if out else rewards.new_zeros(0)


@truth("rm_listmle", {"num_groups": 5}, order="fixed")
def rm_listmle(rewards, scores, groups, *, num_groups=None):
    out = []
    for g in range(num_groups or (groups.max().item() + 1 if len(groups) else 0)):
        rows = [i for i in range(len(groups)) if groups[i] == g]
        ranked = rewards[sorted(rows, key=lambda i: -scores[i].item())]  # sorted is stable
        terms = [torch.log(torch.exp(ranked[k:]).sum()) - ranked[k] for k in range(len(ranked))]
        out.append(sum(terms, 0 * rewards.sum()))
    return torch.stack(out) if out else rewards.new_zeros(0)


@truth("rm_regression", forms={"rewards": 1})
def rm_regression(rewards, scores):
    return sum((rewards[:, k] - scores[:, k]) ** 2 for k in range(rewards.shape[1]))


@truth("restricted_ce", {"label_smoothing": 0.0}, {"label_smoothing": 0.6})
def restricted_ce(logits, ids, *, label_smoothing=0.1):
    p = torch.softmax(logits, -1)
    q = torch.full_like(p, label_smoothing / p.shape[1])
    q[torch.arange(len(ids)), ids] += 1 - label_smoothing
    return -(q * torch.log(p)).sum(-1)
