"""The words that a rule of a sampler keeps, from logits of a few rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import planner
from ..walks.head import Adapted, Head, HeadSpec
from ..walks.logits import to_logits
from ..walks.mask import packed
from .resolve import Ids, Resolved, few_blocks, split
from .words import Rule

_FIRST = 1024  # words that are sorted before all of them are
# Of a large vocabulary; the head is multiplied once for so many. 4, 16, 32 and 64 rows of 151,936
# words took 1.2, 1.1, 0.9 and 0.8 s for 256 tokens on a core, top_k 50, H 1,024.
_ROWS = 32


def resolve_rule(
    rule: Rule,
    hidden: Tensor,  # [n, H], scored tokens
    weight: Tensor | Adapted,  # [V, H]
    bias: Tensor | None,
    spec: HeadSpec,
    limit: int,
) -> Resolved:
    """Waits for a device; z of as many rows as make one large tile exist at once."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _head(hidden, weight, bias, spec)
        few = [head.empty(0, dtype=torch.int64)]
        bits = [head.empty(0, -(-head.plan.vocab // 8), dtype=torch.uint8)]
        counts = [torch.zeros(0, dtype=torch.int64, device="cpu")]
        for a, b in _rows(head):
            allowed = _kept(_logits(head, a, b), rule)
            own = allowed.sum(1).cpu()
            short, long = split(own, limit)
            few.append(allowed[short].nonzero(as_tuple=True)[1])
            bits.append(packed(allowed[long]))
            counts.append(own)
        return _joined(torch.cat(few), torch.cat(bits), torch.cat(counts), limit, head)


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


def _joined(words: Tensor, bits: Tensor, counts: Tensor, limit: int, head: Head) -> Resolved:
    """words: of the tokens with few, one after the other.  bits: of the others."""
    short, long = split(counts, limit)
    ids = Ids.one_after_the_other(words, counts.where(counts <= limit, 0))
    few = few_blocks(ids, short, head.plan.vocab)
    wrong = torch.zeros(len(counts), dtype=torch.bool, device=head.device)
    return Resolved(counts, few, (long, bits, counts[long].to(head.device)), wrong)


def _rows(head: Head) -> list[tuple[int, int]]:
    """As many as a tile of many tokens has cells, however many there are: a tile of few is small,
    and the head would be multiplied for each token."""
    tile = planner.tile_shape(len(head.hidden) + 2**20, head.plan.vocab, head.device.type)
    step = max(_ROWS, tile.tokens * tile.vocab // head.plan.vocab)
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
        least = _nucleus(z, least, rule.top_p, rule.top_k)
    if rule.min_p is not None:
        least = torch.maximum(least, z.amax(1) + math.log(rule.min_p))
    return ~(z < least.unsqueeze(1))


def _nucleus(z: Tensor, least: Tensor, top_p: float, top_k: int | None) -> Tensor:  # [n]
    """The smallest z that top-p keeps of the words from `least` on."""
    words = z.shape[1]
    # One more than top_k: that one closes the row, but where it ties with the last that stays.
    most = words if top_k is None else min(top_k + 1, words)
    lse = z.masked_fill(z < least.unsqueeze(1), float("-inf")).logsumexp(1)
    found, open_rows = z.amax(1), torch.arange(len(z), dtype=torch.int64, device=z.device)
    for width in (min(_FIRST, most), words):
        largest = z[open_rows].topk(width).values
        before = (largest.double() - lse[open_rows].unsqueeze(1)).exp()
        before = before.cumsum(1) - before  # of the words with a larger z
        inside = (before < top_p) & (largest >= least[open_rows].unsqueeze(1))
        found[open_rows] = largest.masked_fill(~inside, float("inf")).amin(1)
        open_rows = open_rows[inside[:, -1]]
        if not len(open_rows):
            break
    return found
