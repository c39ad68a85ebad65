"""Tokens with a few words each: their products alone, and gradients into these words alone.

In bytes: K·H of the weight read in the forward and once more for d hidden, where the walk over the
vocabulary has V·H for a block of tokens. d weight is summed word by word over its tokens in the
order of the call, so that it has the same bits each time.

Tokens come in blocks of about as many words each: how wide a row is, and so in which order its
numbers are added up, is its own matter, and one long list makes no others long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..rows import backend as R
from ..rows import registry
from ..walks.anchored import unit_columns
from ..walks.backward import row_grads
from ..walks.checks import OUTPUTS
from ..walks.derivatives import check_plain, first_derivatives
from ..walks.forward import finish
from ..walks.head import Forward, Head, HeadSpec
from ..walks.logits import nan_where_infinite, to_logits
from ..walks.picked import sorted_by_word, sums_by_token
from ..walks.saving import stays


@dataclass(frozen=True)
class FewCall:
    """What is not a tensor of autograd in one call.

    spec: of the head, its map and its shard; the rows' own temperatures are those of the few.
    blocks: ids [m, K] of m tokens, block after block of all n: words of the whole vocabulary,
        rising, -1 behind the last one.
    columns: [n] the label's place among its token's ids, -1 where it has none.
    """

    name: str
    spec: HeadSpec
    gather: Callable[..., AbstractContextManager[Any]]
    blocks: tuple[Tensor, ...]
    columns: Tensor

    def here(self, words: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Ids among the `words` words of this process, and the label's columns among them."""
        if self.spec.shard is None:
            return self.blocks, self.columns
        columns = self.columns.split([len(ids) for ids in self.blocks])
        first = self.spec.shard.first
        parts = zip(self.blocks, columns, strict=True)
        found = [_here(ids, own, first, words) for ids, own in parts]
        return tuple(ids for ids, _ in found), torch.cat([own for _, own in found])


def _here(ids: Tensor, columns: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """A label of another process stands before all columns or behind them, as its word does."""
    local = ids - first
    label = ids.gather(1, columns.clamp_min(0).unsqueeze(1)).squeeze(1)
    ids = torch.where((local >= 0) & (local < words) & (ids >= 0), local, -1)
    behind = (label >= first + words) & (columns >= 0)
    columns = torch.where((label < first) & (columns >= 0), -1, columns)
    return ids, columns.masked_fill(behind, ids.shape[1])


def score_few(
    call: FewCall,
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H], or the words of this process
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None,  # [n, r] and [V, r]
) -> dict[str, Tensor]:  # [n] each
    down, up = adapter or (None, None)
    with stays():
        results = _Few.apply(hidden, weight, bias, down, up, call)
    return {n: x for n, x in zip(OUTPUTS, results, strict=True) if x is not None}


class _Few(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        call: FewCall,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            few = _FewWords(call, hidden, weight, bias, down, up)
            tiles, saved = few.forward()
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias, down, up, *saved, *tiles)
        outputs = call.spec.outputs
        stats = saved._asdict()
        constant = ("log_sum_sq_probs", "mean_logits", "is_top1")
        ctx.mark_non_differentiable(*(stats[name] for name in constant if name in outputs))
        return tuple(stats[name] if name in outputs else None for name in OUTPUTS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_plain(ctx.call.name, grads)
        by_name = dict(zip(OUTPUTS, grads, strict=True))
        held, last = ctx.saved_tensors, 5 + len(Forward._fields)  # a checkpoint hands them out once
        operands, saved, tiles = held[:5], Forward(*held[5:last]), held[last:]
        with (
            ctx.call.gather(*operands[1:3]),
            torch.no_grad(),
            torch.autocast(operands[0].device.type, enabled=False),
        ):
            few = _FewWords(ctx.call, *operands)
            found = few.backward(by_name, tiles, saved, ctx.needs_input_grad[:5])
        return *first_derivatives(ctx.call.name, found, (*grads, *operands)), None


class _FewWords:
    """The operands of one call, and both its directions."""

    def __init__(
        self,
        call: FewCall,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
    ) -> None:
        self.logit_map = call.spec.logit_map
        self.blocks, columns = call.here(len(weight))
        # The row kernels see z, and columns for words: the map is applied, the shard cut out.
        spec = replace(call.spec, logit_map=R.LogitMap())
        self.head = Head(hidden, weight, None, columns, replace(spec, shard=None))
        self.head.spec = spec
        self.weight, self.whole = unit_columns(weight), call.blocks
        self.words = registry.word_kernels(spec.backend)
        self.bias, self.up = bias, None if up is None else unit_columns(up)
        # A CPU's kernels take float32 beside words of any dtype.
        gemm = torch.float32 if self.head.device.type == "cpu" else self.head.gemm
        self.hidden = unit_columns(nan_where_infinite(hidden, self.logit_map).to(gemm))
        self.down = None if down is None else unit_columns(down.to(gemm))

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Tokens of each block, and their ids."""
        a = 0
        for ids in self.blocks:
            yield slice(a, a + len(ids)), ids
            a += len(ids)

    def forward(self) -> tuple[list[Tensor], Forward]:
        head = self.head
        state = R.filled_rows(R.INITIAL_STATE, len(head.hidden), head.device)
        tiles = [self._folded(part, ids, state[:, part]) for part, ids in self.parts()]
        head.merge(state)
        saved = finish(head, state, len(head.hidden))
        if "mean_logits" in head.spec.outputs:
            counts = torch.cat([(ids >= 0).sum(1) for ids in self.whole])
            saved = saved._replace(mean_logits=state[R.SUM] / counts)
        return tiles, saved

    def _folded(self, part: slice, ids: Tensor, state: Tensor) -> Tensor:
        """Logits [m, K] of one block, once `state` holds them."""
        head, z = self.head, self._logits(part, ids)
        labels, stats = head.labels[part], head.spec.stats
        head.kernels.forward(z, 0, labels, None, state, R.LogitMap(), stats, None, None, False)
        if "mean_logits" in head.spec.outputs:  # of the words alone
            state[R.SUM] = z.masked_fill(ids < 0, 0.0).sum(1)
        return z

    def _logits(self, part: slice, ids: Tensor) -> Tensor:
        """[m, K] float32, -inf where there is no word."""
        z = self.head.empty(*ids.shape, dtype=torch.float32)
        self.words.products(self.hidden[part], self.weight, ids, z)
        if self.down is not None and self.up is not None:
            low = torch.empty_like(z)
            self.words.products(self.down[part], self.up, ids, low)
            z += low
        if self.bias is not None and len(self.bias):
            z += self.bias.float()[ids.clamp_min(0)]
        # After the soft-cap, which would make a finite number of it.
        logit_map = self.logit_map.rows(part.start, part.stop)
        return to_logits(z, 0, None, logit_map).masked_fill_(ids < 0, float("-inf"))

    def backward(
        self,
        grads: dict[str, Tensor | None],
        tiles: Sequence[Tensor],
        saved: Forward,
        needs: tuple[bool, ...],  # d hidden, d weight, d bias, d down, d up
    ) -> tuple[Tensor | None, ...]:
        dx, weight, up = self._dproducts(grads, tiles, saved), self.weight, self.up
        cells = self._by_word(dx) if needs[1] or needs[2] or needs[4] else None
        dhidden = self._drows(dx, weight, self.head.hidden.dtype) if needs[0] else None
        dweight = dbias = ddown = dup = None
        if cells is not None and needs[1]:
            dweight = self._dwords(cells, weight, self.hidden)
        if cells is not None and needs[2] and self.bias is not None:
            ones = torch.ones_like(self.hidden[:, :1])
            dbias = self._dwords(cells, self.bias.unsqueeze(1), ones).squeeze(1)
        if self.down is not None and up is not None:
            ddown = self._drows(dx, up, self.down.dtype) if needs[3] else None
            if cells is not None and needs[4]:
                dup = self._dwords(cells, up, self.down)
        return dhidden, dweight, dbias, ddown, dup

    def _dproducts(
        self, grads: dict[str, Tensor | None], tiles: Sequence[Tensor], saved: Forward
    ) -> list[Tensor]:
        """d loss / d products [m, K] float32 of each block, any number where there is no word."""
        head, entropy = self.head, grads["entropy"] is not None
        rows, found = row_grads(head, grads, saved), []
        for (part, _), z in zip(self.parts(), tiles, strict=True):
            dx, own = torch.empty_like(z), rows[:, part]
            labels = head.labels[part]
            head.kernels.backward(z, None, 0, labels, None, own, R.LogitMap(), entropy, dx)
            logit_map = self.logit_map.rows(part.start, part.stop)
            dx *= logit_map.cap_slope(z) * logit_map.tempered(logit_map.factor, z)
            found.append(dx)
        return found

    def _drows(self, dx: list[Tensor], words: Tensor, dtype: torch.dtype) -> Tensor:  # [n, H]
        head, sharded = self.head, self.head.spec.shard is not None
        width = words.shape[1]
        out = head.empty(len(head.hidden), width, dtype=torch.float32 if sharded else dtype)
        for (part, ids), own in zip(self.parts(), dx, strict=True):
            sums_by_token(head.spec.backend, own, ids, words, out[part])
        return head.sum_over_shards(out).to(dtype)

    def _by_word(self, dx: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of all blocks, sorted by word: coefficients, tokens, and where each word starts."""
        flat = [(part, ids.flatten(), ids.shape[1]) for part, ids in self.parts()]
        device = self.head.device
        words = torch.cat([ids for _, ids, _ in flat])
        tokens = torch.cat(
            [
                torch.arange(p.start, p.stop, dtype=torch.int64, device=device).repeat_interleave(k)
                for p, _, k in flat
            ]
        )
        coefficients = torch.cat([own.flatten() for own in dx])
        return sorted_by_word(coefficients, words, tokens, len(self.weight))

    def _dwords(
        self, cells: tuple[Tensor, Tensor, Tensor], words: Tensor, rows: Tensor
    ) -> Tensor:  # as `words` [V, H]
        out = self.head.empty(*words.shape, dtype=words.dtype)
        coefficients, tokens, offsets = cells
        self.words.sums(coefficients, tokens, offsets, rows, out)
        return out
