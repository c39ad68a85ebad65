"""The slow twins of the primitives: plain PyTorch, any dtype, full logits. Truth in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops.linear_divergence import DivergenceStats
from .ops.linear_topk import TopK
from .ops.stats import TokenStats
from .ops.support.words import Rule, Support


def linear_logps(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...] int64 in [0, V) or ignore_index
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or one per token: [...]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    support: Tensor | Support | Rule | None = None,  # [..., k]
    outside: str = "error",
) -> TokenStats:
    """All statistics of `fastpo.linear_logps`, in the dtype of the inputs, by autograd."""
    z = _logits(hidden, weight, bias, softcap, logit_scale) / _per_row(temperature)
    if support is None:
        return _statistics(z, labels, ignore_index)
    ignore_index = -100 if ignore_index is None else ignore_index
    allowed, labels = _restricted(z.detach(), labels, ignore_index, support, outside)
    return _statistics(z, labels, ignore_index, allowed)


def _restricted(
    z: Tensor, labels: Tensor, ignore_index: int, support: Any, outside: str
) -> tuple[Tensor, Tensor]:
    """The words that count, [..., V], and labels, ignored where they are dropped."""
    allowed = _allowed(z.reshape(-1, z.shape[-1]), support)
    words = labels.flatten()
    ignored = words == ignore_index
    own = allowed.gather(1, words.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    missed, every = ~(own | ignored), ~allowed.any(1)
    if outside == "raw":
        every = every | missed
    elif outside == "drop":
        words = words.masked_fill(missed & ~every, ignore_index)
    return (allowed | every.unsqueeze(1)).view(z.shape), words.view(labels.shape)


def _allowed(z: Tensor, support: Any) -> Tensor:  # [N, V] -> [N, V] bool
    if isinstance(support, Rule):
        return torch.stack([_ruled(row, support) for row in z])
    rows, vocab = z.shape
    allowed = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=z.device)
    if isinstance(support, Support):
        row = torch.arange(rows, dtype=torch.int64, device=z.device)
        row = row.repeat_interleave(support.counts)
        allowed[row, support.ids] = True
    else:
        ids = support.reshape(rows, support.shape[-1])
        allowed.scatter_(1, ids.masked_fill(ids < 0, vocab), True)  # what fills up goes behind
    return allowed[:, :vocab]


def _ruled(z: Tensor, rule: Rule) -> Tensor:  # [V] bool
    """The rules in their order, as the engines write them: by a sort."""
    if rule.top_k is not None:
        least = z.sort(descending=True).values[min(rule.top_k, len(z)) - 1]
        z = z.masked_fill(z < least, -torch.inf)
    if rule.top_p is not None:
        rising = z.sort().values
        kept = rising.softmax(-1).cumsum(-1) > 1 - rule.top_p
        kept[-1] = True
        z = z.masked_fill(z < rising[kept][0], -torch.inf)
    if rule.min_p is not None:
        p = z.softmax(-1)
        z = z.masked_fill(p < rule.min_p * p.max(), -torch.inf)
    return z > -torch.inf


def _per_row(temperature: float | Tensor) -> float | Tensor:
    return temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:  # [..., V]
    z = hidden @ weight.t()
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _statistics(
    z: Tensor, labels: Tensor, ignore_index: int | None, allowed: Tensor | None = None
) -> TokenStats:
    if allowed is not None:
        mean = torch.where(allowed, z, 0).sum(-1) / allowed.sum(-1)
        z = z.masked_fill(~allowed, float("-inf"))
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        ignored = labels == ignore_index
    index = labels.masked_fill(ignored, 0).unsqueeze(-1)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    # A word of probability 0 adds nothing to the entropy; p·log p would be 0·inf for it.
    plogp = torch.where(p > 0, p * log_p.clamp_min(torch.finfo(z.dtype).min), torch.zeros_like(p))
    own, lse = z.gather(-1, index), torch.logsumexp(z, -1)
    word = torch.arange(z.shape[-1], dtype=torch.int64, device=z.device)
    beaten = torch.where(word < index, z >= own, z > own).any(-1)
    stats = {
        "logps": log_p.gather(-1, index).squeeze(-1),
        "entropy": -plogp.sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "mean_logits": z.mean(-1) if allowed is None else mean,
        "is_top1": ~beaten & ~lse.isnan(),
        "lse": lse,
    }
    return TokenStats(**{name: x.masked_fill(ignored, 0) for name, x in stats.items()})


def multi_token_logps(
    hidden_per_depth: Sequence[Tensor],  # D of [..., T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [..., T] or [D, ..., T]
    *,
    ignore_index: int = -100,
    **options: Any,
) -> TokenStats:
    """`fastpo.multi_token_logps`: one depth after the other."""
    depths, T = [], labels.shape[-1]
    for d, hidden in enumerate(hidden_per_depth):
        if labels.dim() == hidden.dim():
            own = labels[d]
        else:
            own = torch.full_like(labels, ignore_index)
            own[..., : max(T - d, 0)] = labels[..., d:]
        depths.append(linear_logps(hidden, weight, own, ignore_index=ignore_index, **options))
    return TokenStats(*map(torch.stack, zip(*depths, strict=True)))


def linear_topk(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    k: int,
    *,
    exclude: Tensor | None = None,  # [...] int64
    mask: Tensor | None = None,  # [...] bool
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TopK:
    """`fastpo.linear_topk` in the dtype of the inputs, by autograd and a stable sort."""
    z = _logits(hidden, weight, bias, softcap, logit_scale) / temperature
    log_p, lse = torch.log_softmax(z, -1), torch.logsumexp(z, -1)
    ranked = z.detach()
    if exclude is not None:
        word = torch.arange(z.shape[-1], dtype=torch.int64, device=z.device)
        ranked = ranked.masked_fill(word == exclude.unsqueeze(-1), float("-inf"))
    ids = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :k]
    values = log_p.gather(-1, ids)
    if mask is not None:
        left_out = ~mask.unsqueeze(-1)
        values, ids = values.masked_fill(left_out, 0), ids.masked_fill(left_out, 0)
        lse = lse.masked_fill(~mask, 0)
    return TopK(values, ids, lse)


def mixed_linear_logps(
    hiddens: Sequence[Tensor],  # M of [..., H_i]
    weights: Sequence[Tensor],  # M of [V, H_i]
    coefficients: Tensor,  # [M] or [..., M]
    labels: Tensor,  # [...] int64 in [0, V) or ignore_index
    *,
    biases: Sequence[Tensor | None] | None = None,  # M of [V]
    temperature: float = 1.0,
    softcaps: Sequence[float | None] | None = None,  # M
    logit_scales: Sequence[float] | None = None,  # M
    ignore_index: int | None = -100,
) -> TokenStats:
    """All statistics of `fastpo.mixed_linear_logps`, in the dtype of the inputs, by autograd."""
    heads = len(hiddens)
    z = [
        _logits(*head)
        for head in zip(
            hiddens,
            weights,
            biases or (None,) * heads,
            softcaps or (None,) * heads,
            logit_scales or (1.0,) * heads,
            strict=True,
        )
    ]
    m = coefficients.to(z[0].dtype).unsqueeze(-1)  # [M, 1] or [..., M, 1]
    mixture = (torch.stack(z, -2) * m).sum(-2)
    return _statistics(mixture / temperature, labels, ignore_index)


def multi_head_logps(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [K, V, H]
    labels: Tensor,  # [...] int64 in [0, V) or ignore_index
    heads: Tensor,  # [...] int64 in [0, K)
    *,
    bias: Tensor | None = None,  # [K, V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
) -> TokenStats:
    """All statistics of `fastpo.multi_head_logps`: every head over every token, then a choice."""
    z = torch.stack(
        [
            _logits(hidden, w, None if bias is None else bias[i], softcap, logit_scale)
            for i, w in enumerate(weight)
        ],
        -2,
    )  # [..., K, V]
    index = heads.to(z.device)[..., None, None].expand(*heads.shape, 1, z.shape[-1])
    own = z.gather(-2, index).squeeze(-2)
    return _statistics(own / temperature, labels, ignore_index)


def _finite(logs: Tensor) -> Tensor:
    """Of a word that a side excludes, 0·(-inf) would be NaN."""
    return logs.clamp_min(max(-1e30, torch.finfo(logs.dtype).min))


def _log_softmax(logits: Tensor) -> Tensor:
    return _finite(torch.log_softmax(logits, -1))


def linear_divergence(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [..., H']
    teacher_weight: Tensor,  # [V, H']
    *,
    kind: str,
    beta: float = 0.5,
    alpha: float = 0.5,
    bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # a number, or one per token: [...]
    teacher_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
) -> DivergenceStats:
    """`fastpo.linear_divergence` in the dtype of the inputs, by autograd, into the teacher too."""
    z = _logits(hidden, weight, bias, softcap, logit_scale) / _per_row(temperature)
    other = _logits(
        teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale
    )
    tempered = temperature if teacher_temperature is None else teacher_temperature
    s, t = _log_softmax(z), _log_softmax(other / _per_row(tempered))
    p, q = s.exp(), t.exp()
    limits = {("jsd", 0.0): "forward_kl", ("jsd", 1.0): "reverse_kl"}
    limits |= {("alpha", 1.0): "forward_kl", ("alpha", 0.0): "reverse_kl"}
    kind = limits.get((kind, alpha if kind == "alpha" else beta), kind)
    if kind == "forward_kl":
        rows = q * (t - s)
    elif kind == "reverse_kl":
        rows = p * (s - t)
    elif kind == "jsd":
        m = _finite((beta * q + (1 - beta) * p).log())
        rows = beta * q * (t - m) + (1 - beta) * p * (s - m)
    elif kind == "alpha":
        rows = (torch.exp(alpha * t + (1 - alpha) * s) - p) / (alpha * (alpha - 1))
    else:
        rows = 0.5 * (p - q).abs()
    return DivergenceStats(rows.sum(-1), -(p * s).sum(-1))
