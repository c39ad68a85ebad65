"""A vocabulary in shards: what the processes of a group tell one another about one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..rows import backend as R


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
        self._check(found[:, :2, n], state)

    def _exchange(self, state: Tensor, words: int) -> Tensor:  # [processes, STATE, n + 1]
        """All states; in the last column the first word and the one after the last.

        float32 holds them exactly up to 2**24.
        """
        bounds = state.new_zeros(R.STATE, 1)
        bounds[0], bounds[1] = self.first, self.first + words
        return all_gather(torch.cat((state, bounds), 1), self.group)

    def _check(self, bounds: Tensor, state: Tensor) -> None:  # [processes, 2]
        """Words that nobody has, or two have, would go into the sums of every row."""
        bounds = bounds[bounds[:, 0].argsort()]
        edge = bounds.new_zeros(1)
        starts = torch.cat((bounds[:, 0], edge + self.vocab))
        partition = (starts == torch.cat((edge, bounds[:, 1]))).all()
        if state.device.type != "cpu":
            # Asking would wait for the device.
            state[R.TARGET].masked_fill_(~partition, float("nan"))
        elif not bool(partition):
            got = ", ".join(f"[{int(a)}, {int(b)})" for a, b in bounds.tolist())
            raise ValueError(
                f"first: expected shards that make up [0, {self.vocab}), got words {got}"
            )
