"""The words that a rule of a sampler keeps, from logits of a few rows at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..walks.head import Adapted, Head, HeadSpec
from ..walks.logits import to_logits
from ..walks.mask import packed
from .resolve import Resolved, split
from .words import Rule

_FIRST = 1024  # words that are sorted before all of them are


def resolve_rule(
    rule: Rule,
    hidden: Tensor,  # [n, H], scored tokens
    weight: Tensor | Adapted,  # [V, H]
    bias: Tensor | None,
    spec: HeadSpec,
    limit: int,
) -> Resolved:
    """Waits for a device; z of as many rows as make one tile exist at once."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _head(hidden, weight, bias, spec)
        few: list[Tensor] = []
        bits: list[Tensor] = []
        counts = [torch.zeros(0, dtype=torch.int64, device="cpu")]
        for a, b in _rows(head):
            allowed = _kept(_logits(head, a, b), rule)
            own = allowed.sum(1).cpu()
            short, long = split(own, limit)
            few.append(_ids(allowed[short], int(own[short].max()) if len(short) else 0))
            bits.append(packed(allowed[long]))
            counts.append(own)
        return _joined(few, bits, torch.cat(counts), limit, head)


def ruled_words(
    rule: Rule,
    hidden: Tensor,  # [n, H]
    weight: Tensor | Adapted,  # [V, H]
    bias: Tensor | None,
    spec: HeadSpec,
    drawn: Tensor,  # [n], a word of each token that is kept in any case
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of all tokens, one after the other, how many each has, on the host, and the probability
    [n] of these among all words."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _head(hidden, weight, bias, spec)
        ids = [head.empty(0, dtype=torch.int64)]
        counts = [torch.zeros(0, dtype=torch.int64, device="cpu")]
        mass = [head.empty(0, dtype=torch.float32)]
        for a, b in _rows(head):
            z = _logits(head, a, b)
            allowed = _kept(z, rule)
            allowed.scatter_(1, drawn[a:b].unsqueeze(1), True)
            ids.append(allowed.nonzero(as_tuple=True)[1])
            counts.append(allowed.sum(1).cpu())
            lse = z.logsumexp(1)
            mass.append((z.masked_fill_(~allowed, float("-inf")).logsumexp(1) - lse).exp())
        return torch.cat(ids), torch.cat(counts), torch.cat(mass)


def _head(hidden: Tensor, weight: Tensor | Adapted, bias: Tensor | None, spec: HeadSpec) -> Head:
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return Head(hidden, weight, bias, labels, spec)


def _joined(
    few: list[Tensor], bits: list[Tensor], counts: Tensor, limit: int, head: Head
) -> Resolved:
    short, long = split(counts, limit)
    width = max((ids.shape[1] for ids in few), default=0)
    padded = [F.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in few]
    octets = -(-head.plan.vocab // 8)
    ids = torch.cat(padded) if padded else head.empty(0, 0, dtype=torch.int64)
    many = torch.cat(bits) if bits else head.empty(0, octets, dtype=torch.uint8)
    wrong = torch.zeros(len(counts), dtype=torch.bool, device=head.device)
    return Resolved(counts, (short, ids), (long, many, counts[long].to(head.device)), wrong)


def _rows(head: Head) -> list[tuple[int, int]]:
    step = max(1, head.plan.tiles.tokens * head.plan.tiles.vocab // head.plan.vocab)
    return [
        (a, min(a + step, last))
        for first, last in head.token_blocks()
        for a in range(first, last, step)
    ]


def _logits(head: Head, a: int, b: int) -> Tensor:  # [b - a, V] float32
    z = head.empty(b - a, head.plan.vocab, dtype=torch.float32)
    for _, v0, v1 in head.vocab_tiles():
        tile = head.products(head.block(a, b), head.words(v0, v1))
        z[:, v0:v1] = to_logits(tile, v0, head.bias, head.logit_map.rows(a, b))
    return z


def _kept(z: Tensor, rule: Rule) -> Tensor:  # [n, V] bool
    """Every step keeps the largest z, so what all of them keep is what lies above one number.

    NaN is kept: its row is NaN in any case.
    """
    least = z.new_full((len(z),), float("-inf"))
    if rule.top_k is not None and rule.top_k < z.shape[1]:
        least = z.topk(rule.top_k).values[:, -1]
    if rule.top_p is not None:
        least = torch.maximum(least, _nucleus(z, least, rule.top_p))
    if rule.min_p is not None:
        least = torch.maximum(least, z.amax(1) + math.log(rule.min_p))
    return ~(z < least.unsqueeze(1))


def _nucleus(z: Tensor, least: Tensor, top_p: float) -> Tensor:  # [n]
    """The smallest z that top-p keeps of the words from `least` on."""
    lse = z.masked_fill(z < least.unsqueeze(1), float("-inf")).logsumexp(1).double()
    found, open_rows = z.amax(1), torch.arange(len(z), dtype=torch.int64, device=z.device)
    for width in (min(_FIRST, z.shape[1]), z.shape[1]):
        largest = z[open_rows].topk(width).values
        before = (largest.double() - lse[open_rows].unsqueeze(1)).exp()
        before = before.cumsum(1) - before  # of the words with a larger z
        inside = (before < top_p) & (largest >= least[open_rows].unsqueeze(1))
        found[open_rows] = largest.masked_fill(~inside, float("inf")).amin(1)
        open_rows = open_rows[inside[:, -1]]
        if not len(open_rows):
            break
    return found


def _ids(allowed: Tensor, width: int) -> Tensor:  # [n, width] rising, -1 behind the last one
    rows, words = allowed.nonzero(as_tuple=True)
    counts = allowed.sum(1)
    starts = (counts.cumsum(0) - counts)[rows]
    columns = torch.arange(len(rows), dtype=torch.int64, device=rows.device) - starts
    return words.new_full((len(allowed), width), -1).index_put_((rows, columns), words)
