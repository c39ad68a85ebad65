"""Ragged words to what the walks take: ids of tokens with few, bits of those with many.

Which is which is decided on the host: on a device this waits for it once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..walks.checks import shape_of, shape_text
from ..walks.mask import packed, unpacked
from .words import Rule, Support

_NONE = -1
_CELLS = 2**26  # booleans of rows with many words at once


class Resolved(NamedTuple):
    """The words of n tokens, without repetitions; what is a list of tokens has places in [0, n).

    counts: [n] int64 on the host, as they were given, 0: no restriction.
    few: tokens [f], their ids [f, K], rising, -1 behind the last one.
    many: tokens [m], their words' bits [m, ⌈V/8⌉] and counts [m], see WordMask.
    wrong: [n] bool, with an id beyond the vocabulary; on a CPU that raises.
    """

    counts: Tensor
    few: tuple[Tensor, Tensor]
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
    ids = _Ids(support, scored)
    few, many = split(ids.counts, limit)
    wrong = torch.zeros(len(scored), dtype=torch.bool, device=scored.device)
    found = []
    for rows in (few, *many.split(max(1, _CELLS // vocab))):
        words = ids.of(rows)
        beyond = (words < _NONE) | (words >= vocab)
        wrong[rows] = beyond.any(1)
        _check_ids(words, beyond, vocab, scored[rows])
        words = torch.where((words < 0) | beyond, vocab, words)
        found.append(_rising(words, vocab) if rows is few else _bits(words, vocab))
    bits = torch.cat(found[1:])
    counts = unpacked(bits).sum(1) if len(many) else bits.new_zeros(0, dtype=torch.int64)
    return Resolved(ids.counts, (few, found[0]), (many, bits, counts), wrong)


def split(counts: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Places of tokens with at most `limit` words, and with more; [n] on the host."""
    few, many = ((counts > 0) & (counts <= limit)), counts > limit
    return few.nonzero().squeeze(1), many.nonzero().squeeze(1)


class _Ids:
    """Ids of tokens as they were given."""

    def __init__(self, support: Tensor | Support, scored: Tensor) -> None:
        if isinstance(support, Support):
            starts = support.counts.cumsum(0) - support.counts
            host = scored.cpu()
            self.values, self.starts = support.ids, starts[host]
            self.counts = support.counts[host]
        else:
            rows = support.flatten(0, -2).index_select(0, scored).long()
            there = rows != _NONE
            self.counts = there.sum(1).cpu()
            self.values = rows[there]
            self.starts = self.counts.cumsum(0) - self.counts

    def of(self, rows: Tensor) -> Tensor:  # [rows, K], -1 behind the last one
        device = self.values.device
        counts = self.counts[rows]
        most = int(counts.max()) if len(rows) else 0
        columns = torch.arange(most, dtype=torch.int64, device=counts.device)
        there = columns < counts.unsqueeze(1)
        places = torch.where(there, self.starts[rows].unsqueeze(1) + columns, len(self.values))
        padding = self.values.new_full((1,), _NONE)
        return torch.cat((self.values, padding))[places.to(device)]


def _check_ids(words: Tensor, beyond: Tensor, vocab: int, tokens: Tensor) -> None:
    """On a CPU; elsewhere the row becomes NaN."""
    if words.device.type == "cpu" and bool(beyond.any()):
        row, column = beyond.nonzero()[0].tolist()
        raise ValueError(
            f"support: expected word ids in [0, {vocab}) or -1, got {int(words[row, column])} "
            f"at token {int(tokens[row])}"
        )


def _rising(words: Tensor, vocab: int) -> Tensor:
    """[n, K] without repetitions; `vocab` where there is no word."""
    words = words.sort(1).values
    again = torch.zeros_like(words, dtype=torch.bool)
    again[:, 1:] = words[:, 1:] == words[:, :-1]
    words = words.masked_fill_(again, vocab).sort(1).values
    return words.masked_fill_(words == vocab, _NONE)


def _bits(words: Tensor, vocab: int) -> Tensor:  # [n, ⌈V/8⌉]
    allowed = torch.zeros(len(words), vocab + 1, dtype=torch.bool, device=words.device)
    return packed(allowed.scatter_(1, words, True)[:, :vocab])
