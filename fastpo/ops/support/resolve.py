"""Ragged words to what the walks take: ids of tokens with few, bits of those with many.

Which is which is decided on the host: on a device this waits for it once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..walks.checks import shape_of, shape_text
from ..walks.mask import packed, unpacked
from .words import Rule, Support

_NONE = -1
_CELLS = 2**24  # booleans of rows with many words at once
# Below, a token's own width costs more in calls than it saves in memory; a multiple of any vector,
# so that no row begins within one.
_NARROWEST = 16


class Resolved(NamedTuple):
    """The words of n tokens, without repetitions; what is a list of tokens has places in [0, n).

    counts: [n] int64 on the host, as they were given, 0: no restriction.
    few: blocks of tokens [f] and their ids [f, K], rising, -1 behind the last one; how wide a block
        is depends on nothing but how many words a token has.
    many: tokens [m], their words' bits [m, ⌈V/8⌉] and counts [m], see WordMask.
    wrong: [n] bool, with an id beyond the vocabulary; on a CPU that raises.
    """

    counts: Tensor
    few: tuple[tuple[Tensor, Tensor], ...]
    many: tuple[Tensor, Tensor, Tensor]
    wrong: Tensor


OUTSIDE = ("error", "raw", "drop")


def check_support(support: Tensor | Support | Rule | None, outside: Any, labels: Tensor) -> None:
    """Before the device is waited for."""
    if not isinstance(outside, str) or outside not in OUTSIDE:
        raise ValueError(f"outside: expected one of {', '.join(OUTSIDE)}, got {outside!r}")
    if support is None or isinstance(support, Rule):
        return
    if isinstance(support, Support):
        if len(support) != labels.numel():
            raise ValueError(
                f"support: expected words of {labels.numel()} tokens, got {len(support)}"
            )
        if support.ids.device != labels.device:
            raise ValueError(f"support: expected device {labels.device}, got {support.ids.device}")
        return
    if not isinstance(support, Tensor):
        raise ValueError(
            "support: expected a tensor of word ids, a fastpo.Support, its rule or None, "
            f"got {_shown(support)}"
        )
    if support.dim() != labels.dim() + 1 or support.shape[:-1] != labels.shape:
        expected = shape_text(*shape_of(labels), "k")
        raise ValueError(f"support: expected shape {expected}, got {shape_of(support)}")
    if support.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"support: expected dtype int32 or int64, got {support.dtype}")
    if support.device != labels.device:
        raise ValueError(f"support: expected device {labels.device}, got {support.device}")


def _shown(support: Any) -> str:
    lists = isinstance(support, (list, tuple))
    return "lists; fastpo.Support.of(lists) makes one" if lists else repr(support)


def resolve(support: Tensor | Support, vocab: int, scored: Tensor, limit: int) -> Resolved:
    """Of the scored tokens, [n] their places; the others' words are not read.

    limit: how many words are few.
    """
    ids, wrong = _within(_given(support, scored), vocab, scored)
    few, many = split(ids.counts, limit)
    return Resolved(ids.counts, few_blocks(ids, few, vocab), _many(ids, many, vocab), wrong)


def split(counts: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Places of tokens with at most `limit` words, and with more; [n] on the host."""
    few, many = ((counts > 0) & (counts <= limit)), counts > limit
    return few.nonzero().squeeze(1), many.nonzero().squeeze(1)


class Ids(NamedTuple):
    """Words of n tokens: token i has values[starts[i]:starts[i] + counts[i]].

    starts, counts: [n] int64 on the host.
    """

    values: Tensor
    starts: Tensor
    counts: Tensor

    @classmethod
    def one_after_the_other(cls, values: Tensor, counts: Tensor) -> Ids:
        return cls(values, counts.cumsum(0) - counts, counts)

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Words of some tokens, flat; of each the place of its token among these, and its own."""
        device, counts = self.values.device, self.counts[tokens]
        total = int(counts.sum())
        rows = torch.arange(len(tokens), dtype=torch.int64, device=device)
        rows = rows.repeat_interleave(counts.to(device), output_size=total)
        places = torch.arange(total, dtype=torch.int64, device=device)
        places -= (counts.cumsum(0) - counts).to(device)[rows]
        return self.values[self.starts[tokens].to(device)[rows] + places], rows, places


def _given(support: Tensor | Support, scored: Tensor) -> Ids:
    """Of the scored tokens, without the -1 of those that have fewer words than others."""
    if not isinstance(support, Support):
        rows = support.flatten(0, -2).index_select(0, scored).long()
        there = rows != _NONE
        return Ids.one_after_the_other(rows[there], there.sum(1).cpu())
    values, counts, host = support.ids, support.counts, scored.cpu()
    there = values != _NONE
    if not bool(there.all()):
        edges = F.pad(counts.cumsum(0), (1, 0)).to(values.device)
        counts = F.pad(there.cumsum(0), (1, 0))[edges].diff().cpu()
        values = values[there]
    every = Ids.one_after_the_other(values, counts)
    return Ids(values, every.starts[host], counts[host])


def _within(ids: Ids, vocab: int, scored: Tensor) -> tuple[Ids, Tensor]:
    """`vocab` for what is no word, and the tokens [n] that have such; on a CPU they raise."""
    wrong = torch.zeros(len(scored), dtype=torch.bool, device=scored.device)
    beyond = (ids.values < 0) | (ids.values >= vocab)
    if not bool(beyond.any()):
        return ids, wrong
    before = F.pad(beyond.cumsum(0), (1, 0))
    first = ids.starts.to(scored.device)
    wrong = before[first + ids.counts.to(scored.device)] > before[first]
    if scored.device.type == "cpu" and bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        own = slice(int(first[row]), int(first[row] + ids.counts[row]))
        raise ValueError(
            f"support: expected word ids in [0, {vocab}) or -1, got "
            f"{int(ids.values[own][beyond[own]][0])} at token {int(scored[row])}"
        )
    return ids._replace(values=ids.values.masked_fill(beyond, vocab)), wrong


def few_blocks(ids: Ids, tokens: Tensor, vocab: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Tokens [f] and ids [f, K] for each power of two that is a token's number of words or next.

    One width for all would be that of the longest list, for every token.
    """
    powers = 2 ** torch.arange(63, dtype=torch.int64, device="cpu")
    widths = powers[torch.searchsorted(powers, ids.counts[tokens])].clamp_min(_NARROWEST)
    blocks = []
    for width in widths.unique().tolist():
        own = tokens[widths == width]
        words, rows, places = ids.of(own)
        padded = words.new_full((len(own), width), vocab)
        padded[rows, places] = words
        blocks.append((own, _rising(padded, vocab)))
    return tuple(blocks)


def _rising(words: Tensor, vocab: int) -> Tensor:
    """[n, K] without repetitions; `vocab` where there is no word."""
    words = words.sort(1).values
    again = torch.zeros_like(words, dtype=torch.bool)
    again[:, 1:] = words[:, 1:] == words[:, :-1]
    words = words.masked_fill_(again, vocab).sort(1).values
    return words.masked_fill_(words == vocab, _NONE)


def _many(ids: Ids, tokens: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [m], bits [m, ⌈V/8⌉] and how many of them are set [m]."""
    bits, counts = [], []
    for part in tokens.split(max(1, _CELLS // vocab)):
        words, rows, _ = ids.of(part)
        shape = len(part), vocab + 1
        allowed = torch.zeros(shape, dtype=torch.bool, device=words.device)
        allowed[rows, words] = True
        bits.append(packed(allowed[:, :vocab]))
        counts.append(_set_bits(bits[-1]))
    return tokens, torch.cat(bits), torch.cat(counts)


def _set_bits(octets: Tensor) -> Tensor:  # [n, bytes] -> [n] int64
    """A sum of booleans would first make an int64 of each."""
    octet = torch.arange(256, dtype=torch.int64, device=octets.device)
    ones = unpacked(octet.to(torch.uint8).unsqueeze(1)).sum(1)
    return ones[octets.int()].sum(1)
