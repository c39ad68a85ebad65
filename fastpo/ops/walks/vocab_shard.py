"""A vocabulary in shards: what the processes of a group tell one another about one call."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..rows import backend as R
from ..rows.pair import backend as P
from .checks import told_of


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # [processes, ...]
    """Of the same shape everywhere."""
    found = x.new_empty(dist.get_world_size(group), *x.shape)
    # Not all_gather_into_tensor: deprecated in torch 2.13 for one that 2.8 does not have.
    dist.all_gather(list(found), x.contiguous(), group=group)
    return found


@dataclass(frozen=True)
class VocabShard:
    """Words [first, first + rows of the weight) of `vocab`; the rest lie in the group's others."""

    first: int
    vocab: int
    group: dist.ProcessGroup | None  # None: all processes

    def sum(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self.group)

    def merge(self, state: Tensor, words: int) -> None:  # [STATE, n]
        """What the rows' state says of `words` words becomes what it says of the vocabulary.

        All processes add up in the same order, so they have the same bits.
        """
        found, n = self._exchange(state, words), state.shape[1]
        maxima, others = found[:, R.MAX, :n], found[:, R.OTHERS, :n]
        m = maxima.amax(0)
        # Finite where a bias of -inf masks all words out: -inf - -inf would be NaN.
        gap = maxima - m.clamp_min(torch.finfo(torch.float32).min)
        shrink = gap.exp()
        moment = found[:, R.MOMENT, :n] + gap.clamp_min(R.LOG_FLOOR) * others
        targets = found[:, R.TARGET, :n]
        # NaN where the label is not; a label that is nowhere stays NaN.
        target = targets.nansum(0).masked_fill_(targets.isnan().all(0), float("nan"))
        state[R.MAX], state[R.TARGET] = m, target
        state[R.OTHERS] = (shrink * others).sum(0)
        state[R.MOMENT] = (shrink * moment).sum(0)
        state[R.SQUARES] = (shrink.square() * found[:, R.SQUARES, :n]).sum(0)
        state[R.SUM] = found[:, R.SUM, :n].sum(0)
        state[R.BEFORE] = found[:, R.BEFORE, :n].amax(0)
        _mark(found[:, :3, n], state[R.TARGET])

    def merge_pair(self, state: Tensor, words: int, over: int | None) -> None:  # [P.STATE, n]
        """The same for two heads: each process's state is a tile that the others' is folded with.

        over: the side whose expectation CROSS is; None where it is none.
        """
        found, n = self._exchange(state, words), state.shape[1]
        masses = [found[:, P.MASS + 2 * i, :n] for i in range(2)]
        shifts = []
        for i in range(2):
            maxima = found[:, P.MAX + 2 * i, :n]
            m = maxima.amax(0)
            reference = m.clamp_min(torch.finfo(torch.float32).min)
            shifts.append((maxima - reference).clamp_min_(P.LOWEST))
            state[P.MAX + 2 * i] = m
            state[P.MASS + 2 * i] = (shifts[i].exp() * masses[i]).sum(0)
        if over is not None:
            a, b = over, 1 - over
            moved = found[:, P.CROSS, :n] + (shifts[a] - shifts[b]) * masses[a]
            state[P.CROSS] = (shifts[a].exp() * moved).sum(0)
        moved = found[:, P.MOMENT, :n] + shifts[0] * masses[0]
        state[P.MOMENT] = (shifts[0].exp() * moved).sum(0)
        _mark(found[:, :3, n], state[P.MASS])

    def best(self, keys: Tensor) -> Tensor:  # [n, k] int64, of best_words.py
        """The best of all processes' words; no two of the keys are equal."""
        found = all_gather(keys, self.group).transpose(0, 1).flatten(1)
        return found.topk(keys.shape[1]).values

    @torch.compiler.disable
    def check(self, words: int, alike: Mapping[str, Any]) -> None:
        """Words that nobody has, or two have, would go into the sums of every row; of what is not
        `alike` in all processes their softmaxes would be of different logits.

        Before anything else is checked, and by all processes of a CPU at once: one that raised
        alone would leave the others waiting for it.
        """
        told = {name: told_of(value) for name, value in alike.items()}
        mark = zlib.crc32(repr(told).encode())
        own = [self.first, self.first + words, self.vocab, mark]
        found = all_gather(torch.tensor(own, dtype=torch.float64, device="cpu"), self.group)
        bounds, marks = found[:, :3], found[:, 3]
        if bool(_partition(bounds)):
            if not bool((marks == mark).all()):
                self._refuse(told)
            return
        if len(sizes := bounds[:, 2].unique().tolist()) > 1:
            got = ", ".join(f"{int(size)}" for size in sizes)
            raise ValueError(f"vocab: expected the same in all processes, got {got}")
        got = ", ".join(f"[{int(a)}, {int(b)})" for a, b, _ in sorted(bounds.tolist()))
        raise ValueError(f"first: expected shards that make up [0, {self.vocab}), got words {got}")

    def _refuse(self, told: dict[str, str]) -> None:
        each: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(self.group))]
        dist.all_gather_object(each, told, group=self.group)
        for name in dict.fromkeys(chain(*each)):
            if len(got := dict.fromkeys(one.get(name, "none") for one in each)) > 1:
                raise ValueError(
                    f"{name}: expected the same in all processes, got {', '.join(got)}"
                )

    def _exchange(self, state: Tensor, words: int) -> Tensor:  # [processes, rows of state, n + 1]
        """All states; in the last column the first word, the one after the last, and `vocab`.

        float32 holds them exactly up to 2**24.
        """
        bounds = state.new_zeros(len(state), 1)
        bounds[0], bounds[1], bounds[2] = self.first, self.first + words, self.vocab
        return all_gather(torch.cat((state, bounds), 1), self.group)


def _mark(bounds: Tensor, row: Tensor) -> None:  # [processes, 3], [n]
    """On a device, where asking would wait for it, wrong shards make NaN of what all is of."""
    row.masked_fill_(~_partition(bounds), float("nan"))


def _partition(bounds: Tensor) -> Tensor:  # [processes, 3]
    bounds, vocab = bounds[:, :2], bounds[:, 2]
    bounds = bounds[bounds.double().sum(1).argsort()]  # one without words before one that has
    starts = torch.cat((bounds[:, 0], vocab[:1]))
    made_up = (starts == torch.cat((vocab.new_zeros(1), bounds[:, 1]))).all()
    return made_up & (vocab == vocab[0]).all()
