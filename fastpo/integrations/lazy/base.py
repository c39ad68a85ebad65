"""One call of a head: what all promises of its logits share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...ops.shards.gathered import HeadOptions, whole
from ...ops.tiles.tiled import Tiled, dense


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
    family: Family = field(default_factory=lambda: Family())
    own_tokens: bool = True
    versions: tuple[int | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.versions = tuple(map(_version, self.operands))

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
        known = self.known.detach()
        return Base(hidden, weight, bias, adapter, self.own, known, self.family, self.own_tokens)

    @cached_property
    def gathered(self) -> Base:
        """With the whole head; where it lies in shards all processes have to ask for it."""
        if not isinstance(self.weight, DTensor):
            return self
        self.check()
        with torch.enable_grad():  # whoever asks first
            weight: Tensor = whole(self.weight)
            bias = None if self.bias is None else whole(self.bias)
        return Base(self.hidden, weight, bias, None, self.own, self.known, self.family)

    def check(self) -> None:
        """Logits that a model had made would not change with its weights, nor go with them."""
        here = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        if here.numel() and not here.untyped_storage().size():
            raise RuntimeError(
                "lm_head.weight: expected to be there after the forward, got one given up; under "
                "FSDP2 say reshard_after_forward=False for the module that holds it"
            )
        names = ("hidden states", "lm_head.weight", "lm_head.bias", "lora_A", "lora_B")
        for name, x, version in zip(names, self.operands, self.versions, strict=True):
            if _version(x) != version:
                raise RuntimeError(
                    f"logits: expected to be read before {name} changes, "
                    "got a change in place since the forward that promised them"
                )

    def select(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        self.check()
        down = self.adapter and (self.adapter[0].index_select(0, rows), self.adapter[1])
        return self.hidden.index_select(0, rows), down

    def products(self, hidden: Tensor, down: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """Of rows of the hidden states and of the adapter's: [N, V]; weight: in their dtype."""
        weight = dense(self.weight).to(hidden.dtype) if weight is None else weight
        bias = self.bias
        with torch.autocast(hidden.device.type, enabled=False):
            x = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
            if down is not None and self.adapter is not None:
                x = x + down.to(x.dtype) @ self.adapter[1].to(x.dtype).t()
        return x


@dataclass(eq=False)
class Family:
    """Logits of one call that were changed in place; views of them do not know."""

    changed: list[Any] = field(default_factory=list)


def _version(x: Tensor | None) -> int | None:
    x = _memory(x)
    return None if x is None or x.is_inference() else x._version


def _memory(x: Tensor | None) -> Tensor | None:
    """What a quantised weight is made of, and of a sharded one what is here."""
    if isinstance(x, DTensor):
        here: Tensor = x.to_local()
        return here
    return x.stored if isinstance(x, Tiled) else x


@dataclass(frozen=True, eq=False)
class Known:
    """The log-probability of one word of every row, for one reading of the logits."""

    labels: Tensor  # [M], -1 where none is known
    logps: Tensor  # [M]
    lse: Tensor  # [M]
    reading: Any = None  # scale and soft-cap, and whether with gradient

    @classmethod
    def of(cls, hidden: Tensor, reading: Any = None) -> Known:
        n, device = len(hidden), hidden.device
        zeros = torch.zeros(n, dtype=torch.float32, device=device)
        labels = torch.full((n,), -1, dtype=torch.int64, device=device)
        return cls(labels, zeros, zeros, reading)

    def detach(self) -> Known:
        return replace(self, logps=self.logps.detach(), lse=self.lse.detach())

    def joined(self, where: Tensor, labels: Tensor, logps: Tensor, lse: Tensor) -> Known:
        """With one word per row; of several the same one's, whichever it is, in all three."""
        if not len(where):
            return self
        order = torch.full_like(self.labels, -1)
        numbers = torch.arange(len(where), dtype=torch.int64, device=where.device)
        order = order.index_copy(0, where, numbers)
        new, order = order >= 0, order.clamp(min=0)
        return Known(
            torch.where(new, labels[order], self.labels),
            torch.where(new, logps[order], self.logps),
            torch.where(new, lse[order], self.lse),
            self.reading,
        )


def same_memory(one: Tensor | None, other: Tensor | None) -> bool:
    """The same memory, as part of the same graph?"""
    if one is None or other is None:
        return one is other
    facts = ((_pointer(x), x.shape, x.requires_grad, x.grad_fn) for x in (one, other))
    return next(facts) == next(facts)


def _pointer(x: Tensor) -> int:
    memory = _memory(x)
    return 0 if memory is None else memory.data_ptr()
