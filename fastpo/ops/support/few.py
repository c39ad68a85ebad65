"""Tokens with a few words each: their products alone, and gradients into these words alone.

In bytes: K·H of the weight read in the forward and once more for d hidden, where the walk over the
vocabulary has V·H for a block of tokens. d weight is summed word by word over its tokens in their
order, so that it has the same bits each time.
"""

from __future__ import annotations

from collections.abc import Callable
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
from ..walks.logits import to_logits
from ..walks.picked import sums_by_token, sums_by_word
from ..walks.saving import stays


@dataclass(frozen=True)
class FewCall:
    """What is not a tensor of autograd in one call.

    spec: of the head, its map and its shard; the rows' own temperatures are those of the few.
    ids: [n, K] words of the whole vocabulary, rising, -1 behind the last one.
    columns: [n] the label's place among them, -1 where it has none.
    """

    name: str
    spec: HeadSpec
    gather: Callable[..., AbstractContextManager[Any]]
    ids: Tensor
    columns: Tensor

    def here(self, words: int) -> tuple[Tensor, Tensor]:
        """ids among the `words` words of this process, and the label's column among them.

        A label of another process stands before all columns or behind them, as its word does.
        """
        if self.spec.shard is None:
            return self.ids, self.columns
        first, k = self.spec.shard.first, self.ids.shape[1]
        local = self.ids - first
        ids = torch.where((local >= 0) & (local < words) & (self.ids >= 0), local, -1)
        own = self.columns.clamp_min(0).unsqueeze(1)
        label = self.ids.gather(1, own).squeeze(1) if k else self.columns
        columns = torch.where(label >= first + words, k, self.columns)
        return ids, torch.where((label < first) & (self.columns >= 0), -1, columns)


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
            z, saved = few.forward()
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias, down, up, z, *saved)
        outputs = call.spec.outputs
        stats = saved._asdict()
        constant = ("log_sum_sq_probs", "mean_logits", "is_top1")
        ctx.mark_non_differentiable(*(stats[name] for name in constant if name in outputs))
        return tuple(stats[name] if name in outputs else None for name in OUTPUTS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_plain(ctx.call.name, grads)
        by_name = dict(zip(OUTPUTS, grads, strict=True))
        *operands, z = ctx.saved_tensors[:6]
        saved = Forward(*ctx.saved_tensors[6:])
        with (
            ctx.call.gather(*operands[1:3]),
            torch.no_grad(),
            torch.autocast(z.device.type, enabled=False),
        ):
            few = _FewWords(ctx.call, *operands)
            found = few.backward(by_name, z, saved, ctx.needs_input_grad[:5])
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
        self.ids, columns = call.here(len(weight))
        # The row kernels see z, and columns for words: the map is applied, the shard cut out.
        spec = replace(call.spec, logit_map=R.LogitMap())
        self.head = Head(hidden, weight, None, columns, replace(spec, shard=None))
        self.head.spec = spec
        self.weight, self.counts = unit_columns(weight), (call.ids >= 0).sum(1)
        self.words = registry.word_kernels(spec.backend)
        self.bias, self.up = bias, None if up is None else unit_columns(up)
        # A CPU's kernels take float32 beside words of any dtype.
        gemm = torch.float32 if self.head.device.type == "cpu" else self.head.gemm
        self.hidden = unit_columns(hidden.to(gemm))
        self.down = None if down is None else unit_columns(down.to(gemm))

    def forward(self) -> tuple[Tensor, Forward]:
        head, outputs = self.head, self.head.spec.outputs
        z = self._logits()
        state = R.filled_rows(R.INITIAL_STATE, len(z), head.device)
        stats = head.spec.stats & ~R.STATS["mean_logits"]
        if z.shape[1]:
            head.kernels.forward(
                z, 0, head.labels, None, state, R.LogitMap(), stats, None, None, False
            )
        if "mean_logits" in outputs:
            state[R.SUM] = z.masked_fill(self.ids < 0, 0.0).sum(1)
        head.merge(state)
        saved = finish(head, state, len(z))
        if "mean_logits" in outputs:
            saved = saved._replace(mean_logits=state[R.SUM] / self.counts)
        return z, saved

    def _logits(self) -> Tensor:  # [n, K] float32, -inf where there is no word
        z = self.head.empty(*self.ids.shape, dtype=torch.float32)
        self.words.products(self.hidden, self.weight, self.ids, z)
        if self.down is not None and self.up is not None:
            low = torch.empty_like(z)
            self.words.products(self.down, self.up, self.ids, low)
            z += low
        if self.bias is not None:
            z += self.bias.float()[self.ids.clamp_min(0)]
        # After the soft-cap, which would make a finite number of it.
        return to_logits(z, 0, None, self.logit_map).masked_fill_(self.ids < 0, float("-inf"))

    def backward(
        self,
        grads: dict[str, Tensor | None],
        z: Tensor,
        saved: Forward,
        needs: tuple[bool, ...],  # d hidden, d weight, d bias, d down, d up
    ) -> tuple[Tensor | None, ...]:
        dx = self._dproducts(grads, z, saved)
        weight, up = self.weight, self.up
        dhidden = self._drows(dx, weight, self.head.hidden.dtype) if needs[0] else None
        dweight = self._dwords(dx, weight, self.hidden) if needs[1] else None
        dbias = None
        if needs[2] and self.bias is not None:
            ones = torch.ones_like(self.hidden[:, :1])
            dbias = self._dwords(dx, self.bias.unsqueeze(1), ones).squeeze(1)
        ddown = dup = None
        if self.down is not None and up is not None:
            ddown = self._drows(dx, up, self.down.dtype) if needs[3] else None
            dup = self._dwords(dx, up, self.down) if needs[4] else None
        return dhidden, dweight, dbias, ddown, dup

    def _dproducts(self, grads: dict[str, Tensor | None], z: Tensor, saved: Forward) -> Tensor:
        """d loss / d products [n, K] float32, 0 where there is no word."""
        head, dx = self.head, torch.zeros_like(z)
        if not z.numel():
            return dx
        entropy = grads["entropy"] is not None
        rows = row_grads(head, grads, saved)
        head.kernels.backward(z, None, 0, head.labels, None, rows, R.LogitMap(), entropy, dx)
        dx *= self.logit_map.cap_slope(z) * self.logit_map.tempered(self.logit_map.factor, z)
        return dx.masked_fill_(self.ids < 0, 0.0)

    def _drows(self, dx: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:  # [n, H]
        sharded = self.head.spec.shard is not None
        out = self.head.empty(len(dx), words.shape[1], dtype=torch.float32 if sharded else dtype)
        sums_by_token(self.head.spec.backend, dx, self.ids, words, out)
        return self.head.sum_over_shards(out).to(dtype)

    def _dwords(self, dx: Tensor, words: Tensor, rows: Tensor) -> Tensor:  # as `words` [V, H]
        out = self.head.empty(*words.shape, dtype=words.dtype)
        sums_by_word(self.head.spec.backend, dx, self.ids, rows, out)
        return out
