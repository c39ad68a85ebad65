"""Truths of the policy gradients: one completion at a time, over the tokens its mask selects."""

import math
from types import SimpleNamespace

import torch
from _objective_truth import truth


def rowwise(function, *columns):
    """Stack function(row) over the rows of the columns; an empty batch has an empty result."""
    rows = [function(*row) for row in zip(*columns, strict=True)]
    return torch.stack(rows) if rows else columns[0].sum(-1)


def mean(x):
    return x.sum() / max(len(x), 1)


def token_mean(mask, num_tokens=None):
    """How a row counts when the mean over rows is the mean over tokens."""
    tokens = int(mask.sum()) if num_tokens is None else num_tokens
    return lambda p: len(mask) * p.sum() / max(tokens, 1)


def kl(ref, logp):
    return torch.exp(ref - logp) - (ref - logp) - 1


def ratios(level, logp, old):
    if level == "token":
        return torch.exp(logp - old)
    whole = torch.exp(mean(logp - old)).expand(len(logp))
    if level == "sequence":
        return whole
    return whole.detach() * torch.exp(logp - logp.detach())


def surrogate(key, *cases, is_factor=True, **facts):
    """Enter a row from a function of its own hyperparameters: (term, reduction, level)."""

    def enter(parts):
        def function(
            logps,
            mask,
            advantages,
            old=None,
            ref=None,
            entropy=None,
            is_weights=None,
            *,
            beta=0.0,
            unbiased_kl=False,
            entropy_coef=0.0,
            **own,
        ):
            term, reduce, level = parts(mask, **own)
            old = logps.detach() if old is None else old
            rows = []
            for i, m in enumerate(mask):
                logp, x = logps[i][m], (logps[i] - old[i])[m]
                w, a = ratios(level, logp, old[i][m]), advantages[i].expand(len(m))[m]
                weights = torch.ones(1).to(logp) if is_weights is None else is_weights[i]
                weights = weights[m] if len(weights) == len(m) else weights
                p = term(SimpleNamespace(w=w, a=a, x=x, logp=logp, weights=weights))
                p = p * weights if is_factor else p
                if beta:
                    p = p + beta * kl(ref[i][m], logp) * (w if unbiased_kl else 1)
                row = reduce(p)
                if entropy_coef:
                    row = row - entropy_coef * token_mean(mask)(entropy[i][m])
                rows.append(row)
            return torch.stack(rows) if rows else logps.sum(-1)

        return truth(key, *cases, needs=("ref_token_logps", "entropy"), **facts)(function)

    return enter


PENALTIES = {"beta": 0.3, "entropy_coef": 0.2}
UNBIASED = {**PENALTIES, "unbiased_kl": True}
CLIP = {"epsilon_low": 0.1, "epsilon_high": 0.6, "delta": 2.0}


def clip(low, high, delta):
    def term(row):
        outer = row.w if delta is None else torch.clamp(row.w, max=delta)
        inner = torch.clamp(row.w, 1 - low, 1 + (low if high is None else high))
        return -torch.min(outer * row.a, inner * row.a)

    return term


@surrogate("grpo", {**CLIP, **PENALTIES}, {"level": "sequence", **UNBIASED})
def grpo(mask, *, epsilon_low=0.2, epsilon_high=None, delta=None, level="token"):
    return clip(epsilon_low, epsilon_high, delta), mean, level


@surrogate("bnpo", CLIP, {"level": "sequence"}, UNBIASED, forms={"advantages": 1})
def bnpo(mask, *, epsilon_low=0.2, epsilon_high=None, delta=None, level="token"):
    return clip(epsilon_low, epsilon_high, delta), token_mean(mask), level


@surrogate("dr_grpo", {"max_length": 9, **CLIP}, UNBIASED)
def dr_grpo(
    mask, *, max_length=None, epsilon_low=0.2, epsilon_high=None, delta=None, level="token"
):
    length = mask.shape[1] if max_length is None else max_length
    return clip(epsilon_low, epsilon_high, delta), lambda p: p.sum() / length, level


@surrogate(
    "dapo",
    {"num_tokens": 37.5, **CLIP},
    {"num_tokens": 0.1, **UNBIASED},
    {"epsilon_high": None},
    forms={"is_weights": 1},
)
def dapo(mask, *, num_tokens=None, epsilon_low=0.2, epsilon_high=0.28, delta=None, level="token"):
    return clip(epsilon_low, epsilon_high, delta), token_mean(mask, num_tokens), level


@surrogate("luspo", {"level": "token", **CLIP}, UNBIASED)
def luspo(mask, *, epsilon_low=0.2, epsilon_high=None, delta=None, level="sequence"):
    return clip(epsilon_low, epsilon_high, delta), torch.sum, level


SEQUENCE_TOKEN = {"level": "sequence_token", "epsilon_low": 0.4, "epsilon_high": 0.6}


@surrogate("gspo", CLIP, SEQUENCE_TOKEN, {**SEQUENCE_TOKEN, **UNBIASED}, detaches=True)
def gspo(mask, *, epsilon_low=0.0003, epsilon_high=0.0004, delta=None, level="sequence"):
    return clip(epsilon_low, epsilon_high, delta), mean, level


@surrogate(
    "cispo",
    {"min_ratio": 0.7, "max_ratio": 1.4, "num_tokens": 37},
    {"level": "sequence", **UNBIASED},
    {"level": "sequence_token"},
    detaches=True,
)
def cispo(mask, *, min_ratio=0.0, max_ratio=5.0, num_tokens=None, level="token"):
    def term(row):
        return -torch.clamp(row.w, min_ratio, max_ratio).detach() * row.a * row.logp

    return term, token_mean(mask, num_tokens), level


@surrogate(
    "sapo",
    {"temperature_pos": 0.5, "temperature_neg": 2.0, **PENALTIES},
    {"level": "sequence", **UNBIASED},
    forms={"advantages": 1},
)
def sapo(mask, *, temperature_pos=1.0, temperature_neg=1.05, level="token"):
    def term(row):
        tau = torch.zeros_like(row.a)
        for t, a in enumerate(row.a):
            tau[t] = temperature_pos if a > 0 else temperature_neg
        return -4 / tau / (1 + torch.exp(-tau * (row.w - 1))) * row.a

    return term, mean, level


@surrogate(
    "vespo",
    {"k_pos": 0.5, "lambda_pos": 0.7, "k_neg": 0.4, "lambda_neg": 1e-4, "num_tokens": 37},
    UNBIASED,
    is_factor=False,
    detaches=True,
)
def vespo(mask, *, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0, num_tokens=None):
    low, high = math.log(1e-8), 20

    def term(row):
        log_w = torch.clamp(row.x.detach(), -20, 20).sum()
        seen = row.weights != 0  # a 0 is a mask's
        log_w = log_w + torch.clamp(torch.log(row.weights[seen]), low, high).sum()
        omega = torch.clamp(log_w, low, high)
        p = []
        for a, logp in zip(row.a, row.logp, strict=True):
            k, lam = (k_pos, lambda_pos) if a >= 0 else (k_neg, lambda_neg)
            p.append(-torch.exp(lam + k * omega - lam * torch.exp(omega)) * a * logp)
        return torch.stack(p) * seen if p else 0 * row.logp

    return term, token_mean(mask, num_tokens), "token"


@truth(
    "gmpo",
    {"epsilon_low": 0.1, "epsilon_high": 0.9, **PENALTIES},
    {"epsilon_low": 3.0, "beta": 0.5},
    needs=("ref_token_logps", "entropy"),
)
def gmpo(
    logps,
    mask,
    advantages,
    old=None,
    ref=None,
    entropy=None,
    *,
    epsilon_low=0.4,
    epsilon_high=None,
    beta=0.0,
    entropy_coef=0.0,
):
    high = epsilon_low if epsilon_high is None else epsilon_high
    old = logps.detach() if old is None else old
    bonus, zero = token_mean(mask), torch.zeros_like(logps)

    def row(logp, m, a, old, ref, entropy):
        x = (logp - old)[m]
        inside = torch.clamp(x, -epsilon_low, high)
        w = torch.exp(mean(torch.min(x, inside) if a > 0 else torch.max(x, inside)))
        penalty = beta * mean(kl(ref[m], logp[m])) if beta else 0
        return -w * a + penalty - (entropy_coef * bonus(entropy[m]) if entropy_coef else 0)

    ref, entropy = (zero if x is None else x for x in (ref, entropy))
    return rowwise(row, logps, mask, advantages, old, ref, entropy)


@truth("rloo", {"epsilon_low": 0.5, "epsilon_high": 3.0}, {"epsilon_low": 2.0})
def rloo(logps, mask, advantages, old=None, *, epsilon_low=0.2, epsilon_high=None):
    high = epsilon_low if epsilon_high is None else epsilon_high

    def row(logp, m, a, old):
        w = torch.exp((logp - old)[m].sum())
        return -torch.min(w * a, torch.clamp(w, 1 - epsilon_low, 1 + high) * a)

    return rowwise(row, logps, mask, advantages, logps.detach() if old is None else old)


@truth("ppo_value", {"clip": 1.0}, {"clip": 0.0}, forms={"values": 1}, gradient_into=("values",))
def ppo_value(values, old, returns, mask, *, clip=0.2):
    scale = token_mean(mask)

    def row(v, old, r, m):
        near = torch.min(torch.max(v, old - clip), old + clip)
        return scale(torch.max((v - r) ** 2, (near - r) ** 2)[m] / 2)

    return rowwise(row, values, old, returns, mask)


@truth("reinforce", {"reduction": "mean"}, {"reduction": "batch"}, {"num_tokens": 7})
def reinforce(logps, mask, advantages, is_weights=None, *, reduction="sum", num_tokens=None):
    weights = torch.ones_like(logps) if is_weights is None else is_weights
    reduce = {"sum": torch.sum, "mean": mean, "batch": token_mean(mask, num_tokens)}[reduction]
    return rowwise(
        lambda logp, m, a, w: reduce((-a * w * logp)[m]), logps, mask, advantages, weights
    )


@truth("nash_md", {"beta": 0.7}, {"level": "token", "beta": 0.7}, detaches=True)
def nash_md(logps, ref, mask, scores, *, beta=0.1, level="sequence"):
    def row(logp, ref, m, s):
        logp, drift = logp[m], (logp.detach() - ref)[m]
        term = drift.sum() * logp.sum() if level == "sequence" else (drift * logp).sum()
        return -(s - 0.5) * logp.sum() + beta * term

    return rowwise(row, logps, ref, mask, scores)


@truth("oreo", {"beta": 0.7, "kl_coef": 0.3}, forms={"values": 1}, detaches=True)
def oreo(logps, ref, values, scores, mask, token_kl=None, *, beta=0.03, kl_coef=0.01):
    penalty = kl(ref, logps) if token_kl is None else token_kl

    def row(logp, ref, v, r, m, penalty):
        l, v = (logp - ref)[m], v[m].detach()
        later = [l[t + 1 :].sum().detach() for t in range(len(l))]
        terms = [(beta * (l[t] + later[t]) + v[t] - r) ** 2 for t in range(len(l))]
        return sum(terms, 0 * l.sum()) / max(len(l), 1) + kl_coef * mean(penalty[m])

    return rowwise(row, logps, ref, values, scores, mask, penalty)


@truth("oreo_value", {"beta": 0.7}, forms={"values": 1}, gradient_into=("values",), detaches=True)
def oreo_value(logps, ref, values, scores, mask, *, beta=0.03):
    def row(l, v, r, m):
        l, v = l[m], v[m]
        terms = [(v[t] + beta * l[t:].sum() - r) ** 2 for t in range(len(l))]
        return sum(terms, 0 * v.sum()) / max(len(l), 1)

    return rowwise(row, (logps - ref).detach(), values, scores, mask)


@truth("direct_advantage", {"beta": 0.7}, forms={"advantages": 1})
def direct_advantage(logps, ref, advantages, segments, mask, *, beta=0.1):
    def row(l, a, ids, m):
        l, a, ids = l[m], a[m], ids[m]
        steps = sorted({i for i in ids.tolist() if i >= 0})
        terms = [(mean(a[ids == s]) / beta - l[ids == s].sum()) ** 2 / 2 for s in steps]
        return sum(terms, 0 * l.sum()) / max(len(steps), 1)

    return rowwise(row, logps - ref, advantages, segments, mask)
