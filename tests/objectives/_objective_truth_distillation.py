"""Truths of the distillation family: probabilities first, logarithms last."""

import torch
from _objective_truth import truth


def kl(p, q):
    return (p * torch.log(p / q)).sum(-1)


def both(student, teacher, temperature):
    return torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)


@truth("forward_kl", {"temperature": 2.5})
def forward_kl(student, teacher, *, temperature=1.0):
    s, t = both(student, teacher, temperature)
    return kl(t, s)


@truth("reverse_kl", {"temperature": 2.5})
def reverse_kl(student, teacher, *, temperature=1.0):
    s, t = both(student, teacher, temperature)
    return kl(s, t)


@truth("jsd", {"beta": 0.0}, {"beta": 1.0}, {"beta": 0.2, "temperature": 0.7})
def jsd(student, teacher, *, beta=0.5, temperature=1.0):
    s, t = both(student, teacher, temperature)
    if beta in (0, 1):
        return kl(s, t) if beta else kl(t, s)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


@truth(
    "alpha_divergence",
    {"alpha": 2.0, "temperature": 1.3},
    {"alpha": -0.6},
    {"alpha": 1.0},
    {"alpha": 1e-7},
)
def alpha_divergence(student, teacher, *, alpha=0.5, temperature=1.0):
    s, t = both(student, teacher, temperature)
    if abs(alpha) < 1e-6 or abs(alpha - 1) < 1e-6:
        return kl(s, t) if alpha < 0.5 else kl(t, s)
    return ((t**alpha * s ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1))


@truth("tvd", {"temperature": 2.5})
def tvd(student, teacher, *, temperature=1.0):
    s, t = both(student, teacher, temperature)
    return 1 - torch.minimum(s, t).sum(-1)


@truth(
    "topk_kl",
    {"direction": "reverse"},
    {"tail": False},
    {"tail": False, "direction": "reverse"},
)
def topk_kl(student, teacher, *, tail=True, direction="forward"):
    def distribution(logps):
        p = torch.exp(logps)
        mass = p.sum(-1, keepdim=True)
        return torch.cat([p, 1 - mass], -1) if tail else p / mass

    pair = distribution(teacher), distribution(student)
    return kl(*pair) if direction == "forward" else kl(*reversed(pair))


@truth("adpa")
def adpa(student, teacher, ref_teacher):
    p, q, q0 = (torch.softmax(x, -1) for x in (student, teacher, ref_teacher))
    return (p * torch.log(q0 / q)).sum(-1)


@truth("aligndistil", {"beta": 0.7, "c": 15.0}, {"c": 0.0})
def aligndistil(student, teacher, reverse, *, beta=0.1, c=10.0):
    rows = []
    for x, z, r in zip(student, teacher, reverse, strict=True):
        w = c * (torch.softmax(z, -1) - torch.softmax(r, -1)).abs().sum() + 1e-3
        target = torch.softmax((1 + w) * z - w * r, -1)
        rows.append(beta * kl(torch.softmax(x, -1), target) / w)
    return torch.stack(rows) if rows else student.sum(-1)


@truth("opd", {"num_tokens": 9.5}, {"num_tokens": 0}, detaches=True)
def opd(logps, teacher, mask, *, num_tokens=None):
    tokens = max(mask.sum() if num_tokens is None else num_tokens, 1)
    rows = [((x - y).detach() * x)[m].sum() for x, y, m in zip(logps, teacher, mask, strict=True)]
    return len(logps) * torch.stack(rows) / tokens if rows else logps.sum(-1)


@truth("iw_opd", {"gamma": 2.0, "num_tokens": 9.5}, {"gamma": 0.0}, detaches=True)
def iw_opd(logps, teacher, mask, old=None, *, gamma=0.5, num_tokens=None):
    tokens = max(mask.sum() if num_tokens is None else num_tokens, 1)
    old = (logps if old is None else old).detach()
    rows = []
    for x, y, o, m in zip(logps, teacher, old, mask, strict=True):
        x, a = x[m], (y - o)[m]
        total = max(a.abs().sum(), 1e-8)
        w = [1 + gamma * (1 - a[:t].abs().sum() / total) for t in range(len(a))]
        rows.append(-sum((w[t] * a[t] * x[t] for t in range(len(a))), 0 * x.sum()))
    return len(logps) * torch.stack(rows) / tokens if rows else logps.sum(-1)
