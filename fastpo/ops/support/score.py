"""Log-probabilities over supports: each token by the way that its number of words makes shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import planner
from ..shards.gathered import HeadOptions, gathered, score
from ..stats import TokenStats
from ..tiles.tiled import Tiled
from ..walks.checks import check_tensors
from ..walks.head import Adapted, HeadSpec, beside, check_labels
from ..walks.mask import WordMask, unpacked
from .few import FewCall, score_few
from .resolve import Resolved, resolve
from .rule import resolve_rule, ruled_words
from .words import Rule, Support


@dataclass(frozen=True)
class _Problem:
    """One call: its operands, and what became of its tokens."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], or the words of this process
    bias: Tensor | None
    labels: Tensor  # [N]
    options: HeadOptions
    gather: Callable[..., AbstractContextManager[Any]]
    adapter: tuple[Tensor, Tensor] | None
    inverse: Tensor | None  # [N]

    def rows(self, index: Tensor | None) -> _Problem:
        """Of some tokens, None: of all."""

        def own(x: Tensor) -> Tensor:
            return x if index is None else x.index_select(0, index)

        adapter = None if self.adapter is None else (own(self.adapter[0]), self.adapter[1])
        inverse = None if self.inverse is None else own(self.inverse)
        return replace(
            self,
            hidden=own(self.hidden),
            labels=own(self.labels),
            options=replace(self.options, ignore_index=None),
            adapter=adapter,
            inverse=inverse,
        )

    @property
    def vocab(self) -> int:
        shard = self.options.shard
        return len(self.weight) if shard is None else shard.vocab


# Nothing here is for a compiler: how many tokens have few words is no constant.
@torch.compiler.disable
def score_over(
    support: Tensor | Support | Rule,
    outside: str,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64 in [0, V) or options.ignore_index
    options: HeadOptions,
    gather: Callable[..., AbstractContextManager[Any]] = gathered,
    adapter: tuple[Tensor, Tensor] | None = None,  # [N, r] and [V, r]
    inverse: Tensor | None = None,  # [N] float64, 1/temperature of each token
) -> TokenStats:
    """`score`, each token's softmax over its own words."""
    problem = _Problem(hidden, weight, bias, labels, options, gather, adapter, inverse)
    scored = torch.ones_like(labels, dtype=torch.bool)
    if options.ignore_index is not None:
        scored = labels != options.ignore_index
    scored = scored.nonzero().squeeze(1)
    own = problem.rows(_part(scored, len(labels)))
    with gather(weight, bias):
        check_tensors(hidden, weight, labels, bias, part=options.shard is not None)
        check_labels(labels, problem.vocab, options.ignore_index)
        found = _resolved(support, own, scored)
        groups = list(_groups(own, found, outside, scored))
    if not groups:  # still a result of the operands, for whoever differentiates it
        groups = [(scored[:0], _score(own.rows(scored[:0]), None))]
    results = {name: _zeros(labels, name) for name in options.outputs}
    for index, stats in groups:
        places = scored if index is None else scored[index]
        whole = index is None and len(scored) == len(labels)
        for name, all_rows in results.items():
            value = getattr(stats, name)
            results[name] = value if whole else all_rows.index_copy(0, places, value)
    return TokenStats(**results)


def kept_words(
    rule: Rule,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    options: HeadOptions,
    gather: Callable[..., AbstractContextManager[Any]] = gathered,
    adapter: tuple[Tensor, Tensor] | None = None,  # [N, r] and [V, r]
) -> tuple[Support, Tensor]:
    """What the rule keeps of each token, and its label, which a sampler has drawn in any case; and
    the probability [N] of these words among all."""
    problem = _Problem(hidden, weight, bias, labels, options, gather, adapter, None)
    with gather(weight, bias):
        check_tensors(hidden, weight, labels, bias, part=options.shard is not None)
        check_labels(labels, problem.vocab, None)
        ids, counts, mass = ruled_words(rule, *_whole(problem), labels)
    return Support(ids, F.pad(counts.cumsum(0), (1, 0))), mass


def _part(rising: Tensor, n: int) -> Tensor | None:
    """None: all of n tokens, of which nothing has to be copied."""
    return None if len(rising) == n else rising


def _zeros(labels: Tensor, name: str) -> Tensor:
    dtype = torch.bool if name == "is_top1" else torch.float32
    return torch.zeros(len(labels), dtype=dtype, device=labels.device)


def _resolved(support: Tensor | Support | Rule, own: _Problem, scored: Tensor) -> Resolved:
    # Words of a source are made by tiles.
    one_by_one = not isinstance(own.weight, Tiled)
    limit = planner.gathered_words(own.vocab, scored.device.type) if one_by_one else 0
    if not isinstance(support, Rule):
        return resolve(support, own.vocab, scored, limit)
    return resolve_rule(support, *_whole(own), limit)


def _whole(own: _Problem) -> tuple[Tensor, Tensor | Adapted, Tensor | None, HeadSpec]:
    """What a rule looks at: the adapter's columns beside the others."""
    if own.options.shard is not None:
        raise ValueError("support: expected word ids where the head lies in shards, got a rule")
    spec = own.options.spec(own.hidden, (False, False), own.weight)
    spec = replace(spec, logit_map=replace(spec.logit_map, inverse=own.inverse))
    if own.adapter is None:
        return own.hidden, own.weight, own.bias, spec
    down, up = own.adapter
    hidden = beside(own.hidden, down.to(own.hidden.dtype))
    return hidden, Adapted(own.weight, up, slice(None)), own.bias, spec


class _Block(NamedTuple):
    """Tokens with a few words: places [m], ids [m, K], the label's column among them or -1 [m]."""

    tokens: Tensor
    ids: Tensor
    columns: Tensor

    def where(self, kept: Tensor) -> _Block:  # [m] bool; waits for a device
        rows = _part(kept.nonzero().squeeze(1), len(kept))
        return self if rows is None else _Block(*(x[rows] for x in self))


# Places among the scored tokens, None: all, and what is found of them.
_Groups = Iterator[tuple[Tensor | None, TokenStats]]


def _groups(own: _Problem, found: Resolved, outside: str, scored: Tensor) -> _Groups:
    device = own.labels.device
    few = [(tokens.to(device), ids) for tokens, ids in found.few]
    blocks = [_Block(t, ids, _columns(ids, own.labels[t])) for t, ids in few]
    many, bits, counts = found.many[0].to(device), *found.many[1:]
    inside = torch.ones(len(own.labels), dtype=torch.bool, device=device)
    for block in blocks:
        inside[block.tokens] = block.columns >= 0
    inside[many] = _has(bits, own.labels[many])
    whole = (found.counts == 0).to(device)
    lost = found.wrong
    if outside == "error":
        _check_inside(own, found, inside, scored)
        lost = lost | ~inside
    # A label that cannot be: its row is NaN.
    own = replace(own, labels=own.labels.masked_fill(lost, own.vocab))
    blocks = [
        block._replace(columns=block.columns.masked_fill(lost[block.tokens], -1))
        for block in blocks
    ]
    inside = inside | lost
    if outside == "raw":
        whole |= ~inside
    yield from _few(own, blocks, inside & ~whole)
    yield from _many(own, many, bits, counts, inside & ~whole)
    rest = whole.nonzero().squeeze(1)
    if len(rest):
        places = _part(rest, len(own.labels))
        yield places, _score(own.rows(places), None)


def _few(own: _Problem, blocks: list[_Block], kept: Tensor) -> _Groups:
    chosen = [block.where(kept[block.tokens]) for block in blocks]
    chosen = [block for block in chosen if len(block.tokens)]
    if not chosen:
        return
    # Of several blocks together they do not rise.
    index = torch.cat([block.tokens for block in chosen])
    places = _part(index, len(own.labels)) if len(chosen) == 1 else index
    rows = own.rows(places)
    ids = tuple(block.ids for block in chosen)
    columns = torch.cat([block.columns for block in chosen])
    call = FewCall(own.options.name, _spec(rows), own.gather, ids, columns)
    yield places, TokenStats(**score_few(call, rows.hidden, rows.weight, rows.bias, rows.adapter))


def _spec(rows: _Problem) -> HeadSpec:
    spec = rows.options.spec(rows.hidden, (True, True), rows.weight)
    return replace(spec, logit_map=replace(spec.logit_map, inverse=rows.inverse))


def _many(own: _Problem, many: Tensor, bits: Tensor, counts: Tensor, kept: Tensor) -> _Groups:
    chosen = kept[many].nonzero().squeeze(1)
    if len(chosen):
        first = 0 if own.options.shard is None else own.options.shard.first
        mask = WordMask(bits[chosen], counts[chosen], first)
        places = _part(many[chosen], len(own.labels))
        yield places, _score(own.rows(places), mask)


def _score(rows: _Problem, mask: WordMask | None) -> TokenStats:
    operands = rows.hidden, rows.weight, rows.bias, rows.labels, rows.options
    return score(*operands, rows.gather, rows.adapter, rows.inverse, mask)


def _columns(ids: Tensor, labels: Tensor) -> Tensor:  # [n]
    """The label's place among rising ids [n, K], -1 where it has none."""
    # Behind the last word -1 would not rise.
    rising = ids.masked_fill(ids < 0, torch.iinfo(torch.int64).max)
    place = torch.searchsorted(rising, labels.unsqueeze(1)).clamp_max(ids.shape[1] - 1)
    return torch.where(ids.gather(1, place) == labels.unsqueeze(1), place, -1).squeeze(1)


def _has(bits: Tensor, labels: Tensor) -> Tensor:  # [m] bool
    place = labels.clamp(0, max(0, 8 * bits.shape[1] - 1)).unsqueeze(1)
    octets = bits.gather(1, place // 8)
    return unpacked(octets).gather(1, place % 8).squeeze(1)


def _check_inside(own: _Problem, found: Resolved, inside: Tensor, scored: Tensor) -> None:
    """On a CPU; elsewhere the row becomes NaN."""
    if inside.device.type == "cpu" and not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(
            f"support: expected each label among its token's words, got label "
            f"{int(own.labels[row])} at token {int(scored[row])}, which has "
            f'{int(found.counts[row])} others; see outside="raw" and outside="drop"'
        )
