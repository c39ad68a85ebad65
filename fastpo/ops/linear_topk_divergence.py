"""`linear_topk_divergence`: of a teacher that is stored as its k best words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .linear_divergence import LEFT_OUT, labels_of, rule_of
from .linear_logps import linear_logps
from .rows import backend as R
from .rows.pair.backend import LOWEST
from .rows.torch import logits
from .tiles.tiled import TileSource, tiled
from .walks.checks import (
    check_flag,
    check_options,
    check_tensors,
    check_whole,
    shape_of,
    shape_text,
)
from .walks.derivatives import check_plain
from .walks.picked import picked_products

_LEAST_REST = -1e-6  # log(1 - p) of a list that holds all the mass


def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor | TileSource,
    teacher_ids: Tensor,
    teacher_logps: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    tail: bool = True,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The divergence over K stored words of the teacher and, with `tail`, one bucket for the rest:
    [...] float32, nats.

    kind: "forward_kl", "reverse_kl" or "jsd" as in `linear_divergence`. Without `tail` both sides
    are renormalised over the K words, as in `fastpo.objectives.get("topk_kl")`. One walk over the
    vocabulary for the student's best word of the K; all K are multiplied by themselves.

    hidden: [..., H] float32, bfloat16 or float16.  weight, bias: [V, H] and [V].
    teacher_ids: [..., K] int64, in [0, V).
    teacher_logps: [..., K] nats, over the whole vocabulary; -inf for a word that is none: lists of
        several lengths are filled up with it, and any id. The student's mass on it belongs to the
        rest; a list without words gives 0.

    mask: [...] bool, as there, as are budget, backend and errors. Gradient flows to hidden, weight
        and bias.
    """
    weight = tiled(weight)
    check_plain("linear_topk_divergence", (hidden, weight, bias, teacher_ids, teacher_logps, mask))
    check_tensors(hidden, weight, labels_of(hidden, mask), bias)
    rule = rule_of(kind, beta, 0.5)
    check_flag("tail", tail)
    if rule.kind not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f"kind: expected forward_kl, reverse_kl or jsd, got {kind!r}")
    _check_lists(hidden, teacher_ids, teacher_logps)
    check_options(temperature, softcap, logit_scale, ("logps",), budget)
    if mask is not None:
        # What is left out may hold anything, and NaN times a gradient of 0 is NaN.
        hidden, teacher_ids, teacher_logps = (
            x.masked_fill(~mask.unsqueeze(-1), 0) for x in (hidden, teacher_ids, teacher_logps)
        )
    _check_ids(teacher_ids, len(weight))
    none = teacher_logps.isneginf()
    scored = ~none.all(-1) if mask is None else mask & ~none.all(-1)
    logit_map = R.LogitMap.of(temperature, softcap, logit_scale)
    rows = hidden, weight, bias, teacher_ids, none, labels_of(hidden, scored)
    student = _listed_logps(*rows, logit_map, budget=budget, backend=backend)
    none = none & scored.unsqueeze(-1)
    student = student.masked_fill(none, -torch.inf)
    teacher = teacher_logps.detach().float().masked_fill(~scored.unsqueeze(-1), 0)
    if tail:
        student, teacher = _with_rest(student), _with_rest(teacher)
    else:
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    # Of a word that a side excludes, 0·(-inf) would be NaN: as in `linear_divergence`.
    student, teacher = student.clamp_min(LOWEST), teacher.clamp_min(LOWEST)
    found = rule.terms(student, teacher)[0].sum(-1)
    return torch.where(scored, found, 0.0)


def _listed_logps(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    ids: Tensor,  # [..., K]
    none: Tensor,  # [..., K] bool, where ids are of no word
    labels: Tensor,  # [...], LEFT_OUT where a token is
    logit_map: R.LogitMap,
    **options: Any,
) -> Tensor:  # [..., K] float32
    """Of each token's own words, from the logit of the best of them.

    z - lse would round at the size of the logits, where p is near 1, and its gradient would cancel.
    """
    rows = hidden.reshape(-1, hidden.shape[-1]), weight, ids.reshape(-1, ids.shape[-1])
    x = picked_products(*rows).view(ids.shape)
    if bias is not None:
        x = x + bias.float()[ids]
    z = logits(x, 0, None, logit_map)
    best = z.detach().masked_fill(none, -torch.inf).argmax(-1, keepdim=True)
    words = torch.where(labels == LEFT_OUT, labels, ids.gather(-1, best).squeeze(-1))
    logps = linear_logps(
        hidden,
        weight,
        words,
        bias=bias,
        temperature=logit_map.temperature,
        softcap=logit_map.softcap,
        logit_scale=logit_map.logit_scale,
        **options,
    ).logps
    assert logps is not None
    return logps.unsqueeze(-1) + (z - z.gather(-1, best))


def _with_rest(logps: Tensor) -> Tensor:
    rest = logps.logsumexp(-1, keepdim=True).clamp_max(_LEAST_REST)
    return torch.cat((logps, torch.log(-torch.expm1(rest))), -1)


def _check_lists(hidden: Tensor, ids: Tensor, logps: Tensor) -> None:
    check_whole(teacher_ids=ids, teacher_logps=logps)
    alike = ids.dim() == hidden.dim() and ids.shape[:-1] == hidden.shape[:-1]
    if ids.dtype != torch.int64 or not alike or ids.shape[-1] < 1:
        expected = shape_text(*shape_of(hidden)[:-1], "K")
        raise ValueError(
            f"teacher_ids: expected int64 of shape {expected}, got {ids.dtype} of {shape_of(ids)}"
        )
    if logps.shape != ids.shape:
        raise ValueError(f"teacher_logps: expected shape {shape_of(ids)}, got {shape_of(logps)}")


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"teacher_ids: expected values in [0, {vocab}), got {low} to {high}")
