"""`linear_topk_divergence`: of a teacher that is stored as its k best words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear_divergence import LEFT_OUT, labels_of, rule_of
from .linear_logps import linear_logps
from .rows import backend as R
from .rows import registry
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
from .walks.derivatives import check_plain, first_derivatives
from .walks.mask import WordMask
from .walks.picked import picked_products

_TEACHERS_REST = -1e-6  # log(1 - Σ q) of a list that holds all the mass, as it was rounded
# Of the student's rest beside its best word of the list. Its gradient goes through the walk times
# the reciprocal, which with a scaled loss must not overflow.
_STUDENTS_REST = 1e-30
_LARGEST_LOGP = 1e-3  # rounding of a logarithm; a list of probabilities has larger numbers


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
    are renormalised over the K words, as in `fastpo.objectives.get("topk_kl")`. All K are
    multiplied by themselves; `tail` takes one walk over the vocabulary, for the words that are not
    listed. They are summed without the others, so the student's rest has its digits down to 1e-30
    of its best listed word (gradients through kept float16 to 1e-9), and no gradient below that.
    The teacher's is 1 - Σ q; of a list that holds all of its mass, at most 1e-6.

    hidden: [..., H] float32, bfloat16 or float16.  weight, bias: [V, H] and [V].
    teacher_ids: [..., K] int64, in [0, V), no word twice for a token.
    teacher_logps: [..., K] nats, over the whole vocabulary; -inf for a word that is none: lists of
        several lengths are filled up with it, and any id. The student's mass on it belongs to the
        rest; a list without words gives 0, whatever its hidden state is. NaN, numbers above 0, a
        word that is listed twice and ids outside raise on a CPU; elsewhere the token is NaN.

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
    none = teacher_logps.isneginf()
    scored = ~none.all(-1) if mask is None else mask & ~none.all(-1)
    if mask is not None:
        teacher_ids = teacher_ids.masked_fill(~mask.unsqueeze(-1), 0)
    # What is left out may hold anything, and NaN times a gradient of 0 is NaN.
    hidden, teacher = (
        x.masked_fill(~scored.unsqueeze(-1), 0) for x in (hidden, teacher_logps.detach())
    )
    wrong = _wrong_lists(teacher_ids, teacher, scored.unsqueeze(-1) & ~none, len(weight))
    registry.choose(backend, hidden.device)  # raises where there is no walk that would
    given = R.LogitMap.of(temperature, softcap, logit_scale), budget, backend
    # Kernels read memory at what nobody has looked at.
    ids = teacher_ids.clamp(0, len(weight) - 1)
    lists = _Lists(ids, none & scored.unsqueeze(-1), scored)
    student = _students(hidden, weight, bias, lists, tail, *given)
    # In float64, in which functions of the last row round as those of the first.
    teacher = teacher.double()
    if tail:
        teacher = _with_rest(teacher, student[..., -1:].detach())
    else:
        teacher = teacher.log_softmax(-1)
    # Of a word that a side excludes, 0·(-inf) would be NaN: as in `linear_divergence`.
    student, teacher = student.clamp_min(LOWEST), teacher.clamp_min(LOWEST)
    found = rule.terms(student, teacher)[0].sum(-1)
    # An infinite hidden state has words that count as absent above, and none under a soft-cap.
    # Times NaN: the gradient is NaN as well.
    wrong = wrong | ~hidden.isfinite().all(-1)
    found = found * torch.ones_like(found).masked_fill(wrong, torch.nan)
    return torch.where(scored, found, 0.0).float()


@dataclass(frozen=True)
class _Lists:
    ids: Tensor  # [..., K] int64
    none: Tensor  # [..., K] bool, where an id is of no word; all are words where not scored
    scored: Tensor  # [...] bool


def _students(
    hidden: Tensor,  # [..., H], 0 where not scored
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    lists: _Lists,
    tail: bool,
    logit_map: R.LogitMap,
    budget: int | None,
    backend: str | None,
) -> Tensor:  # [..., K], with a tail [..., K + 1] float64
    """Log-probabilities of each token's own words and of all others together.

    All are taken beside the best of the list: z - lse would round at the size of the logits, where
    p is near 1, and its gradient would cancel.
    """
    ids, none = lists.ids, lists.none
    rows = hidden.reshape(-1, hidden.shape[-1]), weight, ids.reshape(-1, ids.shape[-1])
    x = picked_products(*rows).view(ids.shape)
    if bias is not None:
        x = x + bias.float()[ids]
    z = logits(_Once.apply(x), 0, None, logit_map).masked_fill(~lists.scored.unsqueeze(-1), 0.0)
    best = z.detach().masked_fill(none, -torch.inf).argmax(-1, keepdim=True)
    top = z.gather(-1, best)
    absent = top.isneginf()  # the student has none of the list's words: -inf - -inf would be NaN
    beside = (z - top.masked_fill(absent, 0.0)).masked_fill(none, -torch.inf)
    if not tail:
        renormalised = beside.masked_fill(absent, 0.0).double().log_softmax(-1)
        return renormalised.masked_fill(absent, -torch.inf)
    words = ids.gather(-1, best).masked_fill(~lists.scored.unsqueeze(-1), LEFT_OUT)
    listed = ids.masked_fill(none | (ids == words), LEFT_OUT)
    logps = _among_the_rest(
        hidden, weight, bias, words.squeeze(-1), listed, logit_map, budget, backend
    )
    # Of the rest beside the best word: log((1 - p)/p).
    share = logps.unsqueeze(-1).masked_fill(absent, -1.0).double().clamp_max(-_STUDENTS_REST)
    rest = torch.log(-torch.expm1(share)) - share
    return torch.cat((beside.double(), rest), -1).log_softmax(-1)


class _Once(torch.autograd.Function):
    """The same, differentiated once: the bias, too, has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return first_derivatives("linear_topk_divergence", (grad,), (grad,))[0]


def _among_the_rest(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    words: Tensor,  # [...], LEFT_OUT where a token is
    listed: Tensor,  # [..., K] what else is in its list, or LEFT_OUT
    logit_map: R.LogitMap,
    budget: int | None,
    backend: str | None,
) -> Tensor:  # [...] float32
    """log p of each token's word in a softmax without the other words of its list.

    So what the walk sums beside its word is the rest, which a difference of probabilities loses.
    """
    plain: dict[str, Any] = {
        "temperature": logit_map.temperature,
        "softcap": logit_map.softcap,
        "logit_scale": logit_map.logit_scale,
        "budget": budget,
        "backend": backend,
    }
    if listed.shape[-1] == 1:  # a list of one word: nothing is masked
        logps = linear_logps(hidden, weight, words, bias=bias, **plain).logps
    else:
        # It imports torch.distributed, which takes half a second.
        from .shards.gathered import HeadOptions, score

        options = HeadOptions(**plain, ignore_index=LEFT_OUT, name="linear_topk_divergence")
        rows = listed.reshape(-1, listed.shape[-1])
        mask = _WithoutLists(rows, len(weight) - (rows >= 0).sum(-1))
        operands = hidden.reshape(-1, hidden.shape[-1]), weight, bias, words.reshape(-1)
        logps = score(*operands, options, mask=mask).logps
    assert logps is not None
    return logps.view(words.shape)


@dataclass(frozen=True)
class _WithoutLists(WordMask):
    """bits: [N, K] int64, the words that do not count, and negative numbers.

    A bit for each word would be a sixteenth of the logits.
    """

    def allowed(self, a: int, b: int, v0: int, v1: int) -> Tensor:
        columns, width = self.bits[a:b] - v0, v1 - v0
        columns = torch.where((columns >= 0) & (columns < width), columns, width)
        found = torch.ones(b - a, width + 1, dtype=torch.bool, device=columns.device)
        return found.scatter_(1, columns, False)[:, :width]


def _with_rest(
    teacher: Tensor,  # [..., K]
    students: Tensor,  # [..., 1] its rest
) -> Tensor:  # [..., K + 1]
    listed = teacher.logsumexp(-1, keepdim=True)
    rest = torch.log(-torch.expm1(listed.clamp_max(_TEACHERS_REST)))
    # A list that holds all the mass says no more of its rest than that; a student without any
    # shall not pay for its rounding.
    rest = torch.where(listed > _TEACHERS_REST, torch.minimum(rest, students), rest)
    return torch.cat((teacher, rest), -1)


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
    if not logps.is_floating_point():
        raise ValueError(f"teacher_logps: expected a floating dtype, got {logps.dtype}")
    for name, x in (("teacher_ids", ids), ("teacher_logps", logps)):
        if x.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {x.device}")


def _wrong_lists(ids: Tensor, logps: Tensor, words: Tensor, vocab: int) -> Tensor:  # [...] bool
    """On a CPU an error; elsewhere nobody waits, and such tokens become NaN."""
    wrong = ~(logps <= _LARGEST_LOGP)  # of NaN, too
    wrong |= words & ((ids < 0) | (ids >= vocab))
    # What is no word may be listed twice.
    others = torch.arange(-ids.shape[-1], 0, dtype=ids.dtype, device=ids.device)
    ranked = torch.where(words, ids, others).sort(-1).values
    twice = ranked[..., 1:] == ranked[..., :-1]
    if ids.device.type == "cpu" and ids.numel():
        _raise_first(wrong, twice, logps, ranked, ids, vocab)
    return wrong.any(-1) | twice.any(-1)


def _raise_first(
    wrong: Tensor, twice: Tensor, logps: Tensor, ranked: Tensor, ids: Tensor, vocab: int
) -> None:
    low, high = map(int, ids.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"teacher_ids: expected values in [0, {vocab}), got {low} to {high}")
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"teacher_logps: expected logarithms of probabilities, at most 0, "
            f"got {logps[place].item()} at {place}"
        )
    if bool(twice.any()):
        place = tuple(twice.nonzero()[0].tolist())
        raise ValueError(
            f"teacher_ids: expected each word once for a token, "
            f"got {int(ranked[place])} twice at {place[:-1]}"
        )
