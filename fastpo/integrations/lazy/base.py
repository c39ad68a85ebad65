"""What promises of logits share: one call of a head, and memory, had the logits been made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...ops.products import mm_, wide_products
from ...ops.shards.gathered import HeadOptions, whole
from ...ops.tiles.tiled import Tiled, dense

Mark = tuple[int | None, int]  # version and place


@dataclass(eq=False)
class Base:
    """What all views of one call of the head share, and the log-probabilities known so far.

    own_tokens: of a weight in shards, whether each process has rows of its own.
    """

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    adapter: tuple[Tensor, Tensor] | None  # [M, r], [V, r]
    own: HeadOptions  # budget and backend
    known: Known
    own_tokens: bool = True
    marks: tuple[Mark, ...] = field(init=False)
    cuts: dict[int, Base] = field(init=False, default_factory=dict)  # with its first words

    def __post_init__(self) -> None:
        self.marks = tuple(map(_mark, self.operands))

    @property
    def joins(self) -> bool:
        """Can an adapter be more columns of the weight?"""
        return self.adapter is None or not isinstance(self.weight, Tiled)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        down, up = self.adapter or (None, None)
        return self.hidden, self.weight, self.bias, down, up

    def on(self, operands: tuple[Tensor | None, ...]) -> Base:
        """The same head with other tensors of the same values."""
        hidden, weight, bias, down, up = operands
        assert hidden is not None and weight is not None
        adapter = None if down is None or up is None else (down, up)
        self.check()
        # What was computed of these tensors brings its gradient to them, past the others.
        trained = any(x is not None and x.requires_grad for x in operands)
        known = Known.of(hidden) if trained else self.known.detach()
        return Base(hidden, weight, bias, adapter, self.own, known, self.own_tokens)

    @property
    def gathered(self) -> Base:
        """With the whole head; where it lies in shards all processes have to ask for it."""
        return self._whole if isinstance(self.weight, DTensor) else self

    @cached_property
    def _whole(self) -> Base:
        self.check()
        with torch.enable_grad():  # whoever asks first
            weight: Tensor = whole(self.weight)
            bias = None if self.bias is None else whole(self.bias)
        return Base(self.hidden, weight, bias, None, self.own, self.known)

    def cut(self, words: int) -> Base:
        """The head of the first words, whose weight is a view; one, however often it is asked."""
        if words not in self.cuts:
            self.cuts[words] = self.chosen(slice(words))
        return self.cuts[words]

    def chosen(self, words: slice | Tensor) -> Base:
        """The head of some words."""
        self.check()
        with torch.inference_mode(False), torch.enable_grad():  # whoever asks first
            weight, bias = self.weight[words], None if self.bias is None else self.bias[words]
            adapter = self.adapter and (self.adapter[0], self.adapter[1][words])
        return Base(self.hidden, weight, bias, adapter, self.own, Known.of(self.hidden))

    def check(self) -> None:
        """Logits that a model had made would not change with its weights, nor go with them."""
        here = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        if here.numel() and not here.untyped_storage().size():
            raise RuntimeError(
                "lm_head.weight: expected to be there after the forward, got one given up; under "
                "FSDP2 say reshard_after_forward=False for the module that holds it"
            )
        names = ("hidden states", "lm_head.weight", "lm_head.bias", "lora_A", "lora_B")
        for name, x, mark in zip(names, self.operands, self.marks, strict=True):
            if _mark(x) != mark:
                raise RuntimeError(
                    f"logits: expected to be read before {name} changes, "
                    "got a change since the forward that promised them"
                )

    def select(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        self.check()
        down = self.adapter and (self.adapter[0].index_select(0, rows), self.adapter[1])
        return self.hidden.index_select(0, rows), down

    def products(
        self, hidden: Tensor, down: Tensor | None, dtype: torch.dtype, weight: Tensor | None = None
    ) -> Tensor:
        """Of rows of the hidden states and of the adapter's: [N, V], float32 where that is wanted.

        Rounded to 16 bits first they would not fit the log-sum-exp, which is of float32 products.

        dtype: of the logits that are wanted.
        weight: of a block, which nobody differentiates.
        """
        whole = dense(self.weight) if weight is None else weight
        wide = hidden.dtype.itemsize < 4 <= dtype.itemsize
        bias = None if self.bias is None else self.bias.to(torch.float32 if wide else hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if wide:
                x = _Wide.apply(hidden, whole)
                x = x if bias is None else x + bias
            elif weight is not None and hidden.dtype == torch.float32:
                x = mm_(hidden.new_empty(len(hidden), len(weight)), hidden, weight.t())
                x = x if bias is None else x.add_(bias)
            else:
                x = F.linear(hidden, whole.to(hidden.dtype), bias)
            if down is not None and self.adapter is not None:
                x = x + down.to(x.dtype) @ self.adapter[1].to(x.dtype).t()
        return x


class _Wide(torch.autograd.Function):
    """Products in float32; their gradient has the dtype that it has behind 16-bit logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return wide_products(hidden, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        dhidden = grad @ weight.to(hidden.dtype) if ctx.needs_input_grad[0] else None
        dweight = (grad.t() @ hidden).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dhidden, dweight


def _mark(x: Tensor | None) -> Mark:
    """Other values in place have another version, those set as `data` lie elsewhere."""
    x = _memory(x)
    if x is None:
        return None, 0
    return None if x.is_inference() else x._version, x.data_ptr()


def _memory(x: Tensor | None) -> Tensor | None:
    """What a quantised weight is made of, and of a sharded one what is here."""
    if isinstance(x, DTensor):
        here: Tensor = x.to_local()
        return here
    return x.stored if isinstance(x, Tiled) else x


NOTHING = torch.iinfo(torch.int64).min  # -1 may be asked for, which is an error

Found = tuple[Tensor, Tensor, Tensor]  # of which rows, their log-probabilities, log-sum-exps


@dataclass(frozen=True, eq=False)
class Known:
    """The log-probability of one word of every row, for one reading of the logits.

    Each call's results stay apart: a backward of some rows runs through the calls that these are
    of, and through no other.
    """

    labels: Tensor  # [M], NOTHING where none is known
    call: Tensor  # [M], which of `calls` it is of
    place: Tensor  # [M], and where in it
    calls: tuple[tuple[Tensor, Tensor], ...] = ()  # log-probabilities and log-sum-exps
    reading: Any = None  # scale and soft-cap, and whether with gradient

    @classmethod
    def of(cls, hidden: Tensor, reading: Any = None) -> Known:
        n, device = len(hidden), hidden.device
        zeros = torch.zeros(n, dtype=torch.int64, device=device)
        return cls(torch.full_like(zeros, NOTHING), zeros, zeros, reading=reading)

    def detach(self) -> Known:
        return replace(self, calls=tuple((x.detach(), y.detach()) for x, y in self.calls))

    def read(self, rows: Tensor, wanted: Tensor) -> list[Found]:
        """What is known of the wanted ones of these rows, call by call."""
        found: list[Found] = []
        if not self.calls:
            return found
        of = self.call[rows]
        for number in of[wanted].unique().tolist():
            where = (wanted & (of == number)).nonzero().squeeze(1)
            place = self.place[rows[where]]
            logps, lse = self.calls[number]
            found.append((where, logps[place], lse[place]))
        return found

    def joined(self, where: Tensor, labels: Tensor, logps: Tensor, lse: Tensor) -> Known:
        """With one word per row; of several the same one's, whichever it is."""
        if not len(where):
            return self
        order = torch.full_like(self.labels, -1)
        numbers = torch.arange(len(where), dtype=torch.int64, device=where.device)
        order = order.index_copy(0, where, numbers)
        new, order = order >= 0, order.clamp(min=0)
        return Known(
            torch.where(new, labels[order], self.labels),
            self.call.masked_fill(new, len(self.calls)),
            torch.where(new, order, self.place),
            (*self.calls, (logps, lse)),
            self.reading,
        )


@dataclass(eq=False)
class Watch:
    """Were the values of some rows changed in place? It outlives their tensor, not their memory."""

    rows: Tensor | None
    here: bool = False  # by the tensor itself
    counter: Tensor | None = None  # of changes through views of the values, which may live longer
    version: int = 0  # of the counter, as far as the tensor itself knows
    storage: StorageWeakRef | None = None

    def see(self, values: Tensor) -> None:
        """From now on; no memory is held."""
        self.storage = StorageWeakRef(values.untyped_storage())
        with torch.inference_mode(False):
            self.counter = values.detach()
            self.counter.data = values.new_empty(0)
        self.version = self.counter._version

    @property
    def elsewhere(self) -> bool:
        """Through a view of the values, which autograd knows and the tensor does not."""
        return self.counter is not None and self.counter._version != self.version

    @property
    def changed(self) -> bool:
        return self.here or self.elsewhere

    @property
    def over(self) -> bool:
        """Nobody has changed the values, and nobody can."""
        return not self.changed and self.storage is not None and self.storage.expired()

    def shares(self, other: Watch) -> bool:
        """Views of the same logits have views of the same row numbers."""
        if self.rows is None or other.rows is None:
            return False
        return same_storage(self.rows, other.rows)


@dataclass(eq=False)
class Family:
    """What was computed or changed of logits and of views of them; a copy has its own."""

    watches: list[Watch] = field(default_factory=list)

    def add(self, watch: Watch) -> None:
        others = (x for x in self.watches if x is not watch and not x.over)
        self.watches = [*others, watch]

    def forget(self, watch: Watch, rows: Tensor) -> bool:
        """Whether it is of just these rows: whoever asks will have its values."""
        own = watch.rows
        if own is None or own.shape != rows.shape or own.stride() != rows.stride():
            return False
        if own.data_ptr() == rows.data_ptr():
            self.watches = [x for x in self.watches if x is not watch]
        return own.data_ptr() == rows.data_ptr()

    def expect_unchanged(self, own: Watch, heir: Watch | None) -> None:
        """But by the tensor that asks. heir: of logits that took its values over."""
        others = [x for x in self.watches if x is not own and x.shares(own)]
        if any(x is not None and x.changed for x in (*others, heir)):
            raise RuntimeError(
                "logits: expected no change in place through another view of them, got one; "
                "fastpo keeps views apart: read the changed one, or change a copy"
            )


def same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def same_memory(one: Tensor | None, other: Tensor | None) -> bool:
    """The same memory, as part of the same graph?"""
    if one is None or other is None:
        return one is other
    facts = ((_pointer(x), x.shape, x.requires_grad, x.grad_fn) for x in (one, other))
    return next(facts) == next(facts)


def _pointer(x: Tensor) -> int:
    memory = _memory(x)
    return 0 if memory is None else memory.data_ptr()
