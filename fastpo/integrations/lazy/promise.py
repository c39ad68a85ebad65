"""What stands for logits until something asks for log-probabilities, or for them.

A promise knows the hidden states and the head. Slicing, reshaping and masking move row numbers
about; scaling and soft-cap are remembered; log-probabilities, log-sum-exp and means run through
fastpo's head. `LazyLogits` is the tensor around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ...ops.shards.gathered import HeadOptions, score
from ...ops.stats import TokenStats
from ...ops.tiles.known import keeps_dtype
from ...ops.tiles.tiled import Tiled
from ...ops.walks.saving import checkpointed
from ..adapter import base_layer, operands, rounded
from ..heads import stored_weight
from .base import Base, Family, Known, same_memory, same_storage

OWN = HeadOptions()


@dataclass(frozen=True, eq=False)
class Promise:
    """Logits [*rows.shape, V]; `rows` are rows of the base, -1 where nothing is scored.

    z = outer·tanh(inner·x) when capped, else inner·x. normalized: log-softmax of it, times sign.
    """

    base: Base
    rows: Tensor
    dtype: torch.dtype
    inner: float = 1.0
    capped: bool = False
    outer: float = 1.0
    normalized: bool = False
    sign: float = 1.0
    family: Family = field(default_factory=Family)  # those in the same memory
    apart: int | None = None  # words of a row in memory, where these are only the first

    @classmethod
    def of(
        cls,
        head: Any,
        hidden: Tensor,
        own: HeadOptions = OWN,
        parts: Any = None,
        own_tokens: bool = True,
    ) -> Promise:
        """Instead of `head(hidden)`, for a linear layer with or without LoRA.

        parts: weight and bias, where the layer's own will be gone when they are read.
        own_tokens: see `Base`.
        """
        # With a device_map the backbone may end elsewhere.
        hidden = hidden.to(stored_weight(head).device)
        given, kind = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        flat = hidden.reshape(-1, hidden.shape[-1])
        # Dropout inside an adapter is drawn here, once.
        bias = head.bias
        if parts is None:
            weight, adapter = operands(head, flat)
        else:
            (weight, bias), adapter = parts, None
        rows = torch.arange(len(flat), dtype=torch.int64, device=flat.device)
        operand = rounded(flat, weight), weight, bias, adapter
        base = Base(*operand, own, Known.of(flat), own_tokens=own_tokens)
        dtype = given if keeps_dtype(base_layer(head)) else hidden.dtype
        made = cls(base, rows.view(hidden.shape[:-1]), dtype)
        # Logits of a pass without gradient stay constants, wherever they are read.
        return made if torch.is_grad_enabled() else made.detach()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, self.words))

    @property
    def ndim(self) -> int:
        return self.rows.ndim + 1

    @property
    def device(self) -> torch.device:
        return self.base.hidden.device

    @property
    def requires_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in self.operands)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.base.operands

    @property
    def memory(self) -> Promise:
        return self

    @property
    def words(self) -> int:
        return self.base.weight.shape[0]

    @property
    def pitch(self) -> int:
        """From a row to the next one in memory."""
        return self.words if self.apart is None else self.apart

    @property
    def strides(self) -> tuple[int, ...]:
        """As in the memory of the logits that these are views of."""
        return (*(n * self.pitch for n in self.rows.stride()), 1)

    def leaves(self, name: str) -> tuple[Tensor | None, ...]:
        """All that `whole` needs, without a graph of their own."""
        return tuple(
            None if x is None else x.detach().requires_grad_(x.requires_grad)
            for x in self.base.operands
        )

    def whole(self, leaves: tuple[Tensor | None, ...]) -> Tensor:
        return self.on(leaves).materialize()

    @property
    def gathered(self) -> Promise:
        """Of the whole head; where it lies in shards all processes have to ask for it."""
        base = self.base.gathered
        return self if base is self.base else replace(self, base=base)

    @property
    def plain(self) -> Promise:
        """The logits under a log-softmax."""
        return replace(self, normalized=False, sign=1.0)

    def view(self, rows: Tensor) -> Promise:
        shared = self.apart is not None and same_storage(rows, self.rows)
        return replace(self, rows=rows, apart=self.apart if shared else None)

    def cut(self, words: int) -> Any:
        """The first words of each row; NotImplemented where the others count, too, or a head of
        some words is not there."""
        if words < 1 or not self._divisible:
            return NotImplemented
        whole = self.gathered
        return replace(whole, base=whole.base.cut(words), apart=self.pitch)

    def chosen(self, words: Tensor) -> Any:
        """A copy of these words of each row; NotImplemented as above."""
        if not self._divisible:
            return NotImplemented
        whole = self.gathered
        return replace(whole.copy(), base=whole.base.chosen(words))

    @property
    def _divisible(self) -> bool:
        return not self.normalized and not isinstance(self.base.weight, Tiled)

    @cached_property
    def dense(self) -> Tensor:
        """The rows as a copy would have them."""
        return self.rows.contiguous()

    def copy(self, **reading: Any) -> Promise:
        """Other logits of these rows, in memory of their own."""
        return replace(self, rows=self.dense, family=Family(), apart=None, **reading)

    def only(self, scored: Tensor) -> Promise:
        """Log-probabilities will be asked for, or count, at `scored` positions only."""
        return self.view(self.rows.masked_fill(~scored, -1))

    def on(self, operands: tuple[Tensor | None, ...]) -> Promise:
        return replace(self, base=self.base.on(operands))

    def detach(self) -> Promise:
        """Itself where there is no gradient: what is known of its base, and whose logits two
        readings are, hang on which base it is."""
        self.base.check()
        if not self.requires_grad:
            return self
        return self.on(tuple(None if x is None else x.detach() for x in self.base.operands))

    def joined(self, others: Sequence[Any], dim: int) -> Any:
        """This one and others of the same head and reading, one after the other along their rows;
        NotImplemented for anything else."""
        if not all(isinstance(x, Promise) and self._alike(x) for x in others):
            return NotImplemented
        all_of, base = (self, *others), self.base
        for x in all_of:
            x.base.check()
        hidden = torch.cat([x.base.hidden for x in all_of])
        down = None if base.adapter is None else torch.cat([x.base.adapter[0] for x in all_of])
        first = accumulate((len(x.base.hidden) for x in all_of[:-1]), initial=0)
        rows = [torch.where(x.rows < 0, -1, x.rows + n) for x, n in zip(all_of, first, strict=True)]
        adapter = None if down is None or base.adapter is None else (down, base.adapter[1])
        one = Base(hidden, base.weight, base.bias, adapter, base.own, Known.of(hidden))
        return replace(self, base=one, rows=torch.cat(rows, dim), family=Family(), apart=None)

    def alike(self, other: Promise) -> bool:
        """The same reading of the same rows of one call of the head?"""
        return self.base is other.base and self.dense is other.dense and self._alike(other)

    def _alike(self, other: Promise) -> bool:
        mine, theirs = (
            (x.inner, x.capped, x.outer, x.normalized, x.sign, x.dtype, x.rows.ndim, x.base.own)
            for x in (self, other)
        )
        heads = zip(self.operands[1:3], other.operands[1:3], strict=True)
        ups = (None if x.base.adapter is None else x.base.adapter[1] for x in (self, other))
        return mine == theirs and all(same_memory(*pair) for pair in (*heads, tuple(ups)))

    def scaled(self, factor: Any) -> Any:
        """times a number; NotImplemented where `linear_logps` has no such logits."""
        if not isinstance(factor, int | float):
            return NotImplemented
        if self.normalized:
            return self.copy(sign=-self.sign) if factor == -1 else NotImplemented
        scale = float((self.outer if self.capped else self.inner) * factor)
        if not isfinite(scale) or (self.capped and scale <= 0):  # a soft-cap knows no sign
            return NotImplemented
        return self.copy(outer=scale) if self.capped else self.copy(inner=scale)

    @property
    def options(self) -> HeadOptions:
        cap, scale = (self.outer, self.inner * self.outer) if self.capped else (None, self.inner)
        return replace(self.base.own, softcap=cap, logit_scale=scale)

    def stats(self, labels: Tensor, *outputs: str) -> TokenStats:
        """`linear_logps` of these rows; zeros where nothing is scored."""
        rows = self.rows.flatten()
        found = (rows >= 0).nonzero().squeeze(1)
        hidden, adapter = self.base.select(rows.index_select(0, found))
        with _exact(self):
            stats = score(
                hidden,
                self.base.weight,
                self.base.bias,
                labels.to(rows.device).flatten().index_select(0, found),
                replace(self.options, outputs=("logps", *outputs)),
                adapter=adapter,
            )
        return TokenStats(*(_placed(x, found, self.rows) for x in stats))

    def logps(self, labels: Tensor) -> Tensor:
        """log softmax(z)[label] [*rows.shape], float32; what is known already is not computed."""
        return self._known(labels)[0]

    def lse(self) -> Tensor:
        """log Σ exp z [*rows.shape], float32; free where any log-probability is known."""
        return self._known(None)[1]

    def _known(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and log-sum-exp; without labels any word's log-probability will do."""
        known, rows = self._remembered(), self.rows.flatten()
        if labels is None:
            labels = known.labels[self.rows.clamp(min=0)].clamp(min=0)
        if labels.shape != self.rows.shape:
            expected, got = tuple(self.rows.shape), tuple(labels.shape)
            raise ValueError(f"labels: expected shape {expected}, got {got}")
        labels = labels.to(rows.device).flatten()
        scored, at = rows >= 0, rows.clamp(min=0)
        same = known.labels[at] == labels
        found = known.read(at, scored & same)
        missing = (scored & ~same).nonzero().squeeze(1)
        # Rows without a label have gradients, too, of zeros: a batch of padding must not fail.
        graph = self.requires_grad and torch.is_grad_enabled()
        if len(missing) or (graph and not found):
            where = rows.index_select(0, missing)
            new = labels.index_select(0, missing)
            stats = self.view(where).stats(new, "lse")
            assert stats.logps is not None and stats.lse is not None
            # Straight into the results: a row may be asked for several words at once.
            found.append((missing, stats.logps, stats.lse))
            self.base.known = known.joined(where, new, stats.logps, stats.lse)
        logps = lse = torch.zeros(len(rows), dtype=torch.float32, device=rows.device)
        for which, *values in found:
            logps, lse = (
                x.index_copy(0, which, y) for x, y in zip((logps, lse), values, strict=True)
            )
        return logps.view(self.rows.shape), lse.view(self.rows.shape)

    def _remembered(self) -> Known:
        """What is known of this reading; nothing where a checkpoint counts what is saved.

        Its recomputation must save as many tensors as its forward did.
        """
        reading = self.inner, self.capped, self.outer, torch.is_grad_enabled()
        known = self.base.known
        if checkpointed() or known.reading != reading:
            return Known.of(self.base.hidden, reading)
        return known

    def means(self) -> Any:
        """Mean logit of every row [*rows.shape], with gradient, without products over words.

        Capped: a pass over the words where no gradient is needed, else NotImplemented.
        """
        base, rows = self.base, self.rows.flatten().clamp(min=0)
        if self.capped and self.requires_grad and torch.is_grad_enabled():
            return NotImplemented
        if self.capped:
            stats = self.view(rows).stats(torch.zeros_like(rows), "mean_logits")
            assert stats.mean_logits is not None
            return stats.mean_logits.view(self.rows.shape)
        hidden, adapter = base.select(rows)
        with _exact(self):
            # No float32 copy of the weight.
            mean = hidden.float() @ base.weight.mean(0, dtype=torch.float32)
            if adapter is not None:
                mean = mean + adapter[0].float() @ adapter[1].mean(0, dtype=torch.float32)
        if base.bias is not None:
            mean = mean + base.bias.float().mean()
        return (mean * self.inner).view(self.rows.shape)

    def materialize(self) -> Tensor:
        """The logits, as the model would have made them."""
        base = self.base.gathered
        hidden, adapter = base.select(self.rows.flatten().clamp(min=0))
        down = None if adapter is None else adapter[0]
        return self.read(base.products(hidden, down, self.dtype)).view(self.shape)

    def read(self, x: Tensor) -> Tensor:
        """What this reading makes of the head's products [N, V]."""
        with _exact(self):
            if self.inner != 1:
                x = x * self.inner
            x = x.to(self.dtype)
            x = x.tanh() * self.outer if self.capped else x
            return self.sign * x.log_softmax(-1) if self.normalized else x


def _exact(logits: Promise) -> Any:
    """The dtype of the products was chosen where the head was called."""
    return torch.autocast(logits.device.type, enabled=False)


def _placed(values: Tensor | None, where: Tensor, like: Tensor) -> Tensor | None:
    if values is None:
        return None
    return values.new_zeros(like.numel()).index_copy(0, where, values).view(like.shape)
