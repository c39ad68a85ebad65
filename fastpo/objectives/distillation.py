"""Distillation and full-vocabulary terms: divergences between a student and a teacher.

`s, t` are the log-softmax of student and teacher logits over temperature, `p_S, p_T` their
probabilities, `KL(P‖Q) = Σ_v P·(log P - log Q)` in nats; no temperature² factor. The first eight
return [P], one value per position: the fused engine computes them tile by tile, these functions
are their definition. Gradient goes into the student only. A logit of -inf is a word of probability
0, whose logarithm counts as -1e30.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from ._math import EXP_CAP, cut, log1mexp, masked_sum
from ._parameters import NonNegative, OneOf, Positive, Unit
from ._registry import objective

_LOWEST = -1e30  # of a word that a side excludes: -inf - -inf and 0·inf are NaN
_NEAR = 1e-6  # an alpha this close to 0 or 1 is that limit: the formula divides 0 by 0 there


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P‖Q) of two log-distributions [P, V] -> [P]."""
    return (p.exp() * (p - q)).sum(-1)


def _log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return _finite(torch.log_softmax(logits / temperature, -1))


def _finite(x: Tensor) -> Tensor:
    return x.clamp(min=_LOWEST)


@objective("forward_kl", paper="arXiv:1503.02531", family="distillation")
def forward_kl(
    student_logits: Tensor,  # [P, V]
    teacher_logits: Tensor,  # [P, V]
    *,
    temperature: Annotated[float, Positive] = 1.0,
) -> Tensor:  # [P] nats
    """KL(p_T‖p_S), from teacher to student: covers the teacher's modes."""
    return _kl(_log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature))


@objective("reverse_kl", paper="arXiv:2306.08543", family="distillation")
def reverse_kl(
    student_logits: Tensor,  # [P, V]
    teacher_logits: Tensor,  # [P, V]
    *,
    temperature: Annotated[float, Positive] = 1.0,
) -> Tensor:  # [P] nats
    """KL(p_S‖p_T), from student to teacher: on-policy distillation, MiniLLM."""
    return _kl(_log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature))


@objective("jsd", paper="arXiv:2306.13649", family="distillation")
def jsd(
    student_logits: Tensor,  # [P, V]
    teacher_logits: Tensor,  # [P, V]
    *,
    beta: Annotated[float, Unit] = 0.5,
    temperature: Annotated[float, Positive] = 1.0,
) -> Tensor:  # [P] nats
    """β·KL(p_T‖m) + (1-β)·KL(p_S‖m), m = β·p_T + (1-β)·p_S (GKD).

    β 0 is forward_kl and 1 reverse_kl by definition, as in TRL; the limits of the formula are 0.
    """
    if beta == 0:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)
    s, t = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    mixture = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    return beta * _kl(t, mixture) + (1 - beta) * _kl(s, mixture)


@objective("alpha_divergence", family="distillation")
def alpha_divergence(
    student_logits: Tensor,  # [P, V]
    teacher_logits: Tensor,  # [P, V]
    *,
    alpha: float = 0.5,
    temperature: Annotated[float, Positive] = 1.0,
) -> Tensor:  # [P]
    """(Σ_v p_T^α·p_S^{1-α} - 1)/(α·(α-1)), Amari's; the sum stops at e^40, without gradient.

    α within 1e-6 of 1 is forward_kl, of 0 reverse_kl.
    """
    if abs(alpha - 1) < _NEAR:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    if abs(alpha) < _NEAR:
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)
    s, t = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    e = (alpha * t + (1 - alpha) * s).clamp(max=EXP_CAP).exp()
    # (p_S - e)/α + (p_T - e)/(1-α), as products: near α = 0 and 1 the differences are rounding.
    gap = 0.5 * (t - s)
    above = (e + s.exp()) * torch.tanh(alpha * gap) / -alpha
    found = (above + (e + t.exp()) * torch.tanh((1 - alpha) * gap) / (1 - alpha)).sum(-1)
    # A sum of one capped exponential may fall short of its value by rounding.
    capped = e.detach().sum(-1) >= math.exp(EXP_CAP) * (1 - 1e-6)
    return found.masked_fill(capped, math.expm1(EXP_CAP) / (alpha * (alpha - 1)))


@objective("tvd", family="distillation")
def tvd(
    student_logits: Tensor,  # [P, V]
    teacher_logits: Tensor,  # [P, V]
    *,
    temperature: Annotated[float, Positive] = 1.0,
) -> Tensor:  # [P]
    """½·Σ_v |p_T - p_S|, total variation distance."""
    s, t = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    return 0.5 * (t.exp() - s.exp()).abs().sum(-1)


def _with_tail(topk_logps: Tensor) -> Tensor:
    """[P, K] -> [P, K + 1]: one more word, that holds the rest of the mass."""
    rest = log1mexp(cut(topk_logps.logsumexp(-1, keepdim=True)))
    return torch.cat([topk_logps, rest], -1)


@objective(
    "topk_kl",
    paper="arXiv:2112.00861",
    family="distillation",
    aliases=("context_distillation",),
)
def topk_kl(
    student_topk_logps: Tensor,  # [P, K] nats
    teacher_topk_logps: Tensor,  # [P, K] nats, of the same words
    *,
    tail: bool = True,
    direction: Annotated[str, OneOf("forward", "reverse")] = "forward",
) -> Tensor:  # [P] nats
    """KL over K words and a bucket for the rest (tail), or over the K words renormalised.

    forward: KL(teacher‖student), reverse: KL(student‖teacher). Context distillation: the teacher
    is the model with the context in its prompt.
    """
    lists = _finite(student_topk_logps), _finite(teacher_topk_logps)
    student, teacher = map(_with_tail if tail else _log_softmax, lists)
    return _kl(teacher, student) if direction == "forward" else _kl(student, teacher)


@objective("adpa", paper="arXiv:2502.17927", family="distillation")
def adpa(
    student_logits: Tensor,  # [P, V]
    teacher_logits: Tensor,  # [P, V] of the aligned teacher
    ref_teacher_logits: Tensor,  # [P, V] of the teacher before alignment
) -> Tensor:  # [P] nats
    """-Σ_v p_S·(log p_T - log p_refT): the student's expected advantage under the teachers."""
    advantage = _log_softmax(teacher_logits) - _log_softmax(ref_teacher_logits)
    return -(_log_softmax(student_logits).exp() * advantage).sum(-1)


@objective("aligndistil", paper="arXiv:2503.02832", family="distillation")
def aligndistil(
    student_logits: Tensor,  # [P, V]
    teacher_logits: Tensor,  # [P, V] z, of the DPO model
    reverse_teacher_logits: Tensor,  # [P, V] z', of the reverse-DPO model
    *,
    beta: Annotated[float, Positive] = 0.1,
    c: Annotated[float, NonNegative] = 10.0,
) -> Tensor:  # [P] nats
    """(β/w)·KL(p_S‖softmax(z + w·(z - z'))), w = c·Σ_v |softmax z - softmax z'| + 1e-3.

    c is 10 off-policy and 15 on-policy in the paper.
    """
    z, reverse = _finite(teacher_logits), _finite(reverse_teacher_logits)
    gap = (z.softmax(-1) - reverse.softmax(-1)).abs().sum(-1)
    w = c * gap + 1e-3
    target = _log_softmax(z + w[:, None] * (z - reverse))
    return beta / w * _kl(_log_softmax(student_logits), target)


def _per_token(rows: Tensor, mask: Tensor, num_tokens: float | Tensor | None) -> Tensor:
    """N·rows / max(D, 1): their mean is the batch's sum per token. D without a host read."""
    total = mask.sum() if num_tokens is None else num_tokens
    total = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
    return rows.shape[0] * rows / total


@objective("opd", family="distillation")
def opd(
    token_logps: Tensor,  # [N, T] nats
    teacher_token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    *,
    num_tokens: float | Tensor | None = None,
) -> Tensor:  # [N]
    """N·Σ_m sg(logp_t - teacher_t)·logp_t / max(D, 1): reverse KL of the sampled tokens.

    D = num_tokens, or the scored tokens of the batch. Value and gradient are those of REINFORCE
    with advantage teacher_t - logp_t.
    """
    excess = (token_logps - teacher_token_logps).detach()
    return _per_token(masked_sum(excess * token_logps, mask), mask, num_tokens)


@objective("iw_opd", paper="arXiv:2606.22600", family="distillation")
def iw_opd(
    token_logps: Tensor,  # [N, T] nats
    teacher_token_logps: Tensor,  # [N, T] nats
    mask: Tensor,  # [N, T] bool
    old_token_logps: Tensor | None = None,  # [N, T] nats, of the sampler
    *,
    gamma: Annotated[float, NonNegative] = 0.5,
    num_tokens: float | Tensor | None = None,
) -> Tensor:  # [N]
    """-N·Σ_m w_t·A_t·logp_t / max(D, 1), A_t = teacher_t - old_t without gradient (TRL).

    w_t = 1 + γ·(1 - Σ_{k<t} |A_k| / max(Σ_k |A_k|, 1e-8)): early tokens count up to 1 + γ, as the
    rest of the sequence hangs on them. old absent: logp. D as in `opd`.
    """
    old = token_logps if old_token_logps is None else old_token_logps
    advantage = torch.where(mask, teacher_token_logps - old.detach(), 0)
    size = advantage.abs()
    before = size.cumsum(-1) - size
    weight = 1 + gamma * (1 - before / size.sum(-1, keepdim=True).clamp(min=1e-8))
    return _per_token(-masked_sum(weight * advantage * token_logps, mask), mask, num_tokens)
