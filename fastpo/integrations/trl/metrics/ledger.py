"""Tensors that will be gathered and numbers that will be fetched, all of them at once.

A metric is asked of the device long before anybody reads it. A `Ledger` writes down what is asked:
which tensors to gather over the processes, what to compute of them, which scalars to bring to the
host. It then gathers them in one collective and fetches them in one transfer. The arithmetic is
the one that was written, tensors' on the device and numbers' in Python, so no value changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from .pending import Gathered, PendingNumber, PendingTensor

Site = tuple[CodeType, int]  # a line of a function
# Numbers a ledger keeps before it fetches them unasked; they are small, a forgotten log is not.
_MOST = 1 << 14


class Ledger:
    """What one trainer has asked for and not read yet. All processes ask for the same."""

    def __init__(self) -> None:
        self.open = False
        self._guards: frozenset[Site] = frozenset()
        self._accelerator: Any = None
        self._leaves: list[Gathered] = []
        self._items: list[PendingNumber] = []  # their tensors are not computed yet
        self._packed: list[tuple[Tensor, list[PendingNumber]]] = []  # bytes on the device
        self._results: list[PendingNumber] = []  # of arithmetic, operands before results
        self._promises: list[PendingTensor | PendingNumber] = []

    @contextmanager
    def recording(self, accelerator: Any, guards: frozenset[Site] = frozenset()) -> Iterator[None]:
        """Open for the length of a micro-batch.

        guards: where `x > 0` is True without a look. The quotient by x that has to follow is 0.0
            should x not be positive, as `a / x if x > 0 else 0.0` is.
        """
        self._accelerator, self.open, self._guards = accelerator, True, guards
        self._promises.clear()
        try:
            yield
        finally:
            self.open = False
        if any(value.promised for value in self._promises):
            raise RuntimeError("x > 0: expected a division by x to follow, got another use")
        self._settle()

    def gathered(self, local: Tensor, rows: int | None = None) -> PendingTensor:
        """The first `rows` rows of all processes' tensors, as accelerate concatenates them."""
        leaf = Gathered(self, local, rows)
        self._leaves.append(leaf)
        return leaf

    def guards(self, frame: FrameType) -> bool:
        """Whether the `>` that this frame is at is a guard: the line has no other comparison."""
        return self.open and (frame.f_code, frame.f_lineno) in self._guards

    def promise(self, value: PendingTensor | PendingNumber) -> bool:
        value.promised = True
        self._promises.append(value)
        return True

    def keep(self, number: PendingNumber, *, result: bool) -> PendingNumber:
        (self._results if result else self._items).append(number)
        return number

    def _settle(self) -> None:
        """At the end of a micro-batch: gathers where the gradients are about to be averaged.

        Not when somebody reads: that may be one process alone, and it would wait for ever.
        """
        if self._accelerator.sync_gradients or not self._accelerator.use_distributed:
            self._compute()
        else:
            for leaf in self._leaves:
                # A model with CUDA graphs writes its next outputs into the same memory.
                leaf.local = leaf.local.detach().clone()
        if len(self._results) + sum(len(items) for _, items in self._packed) > _MOST:
            self.read()

    def communicate(self) -> None:
        """One collective for all tensors that wait for one."""
        leaves, self._leaves = self._leaves, []
        if not leaves:
            return
        gather, tensors = self._accelerator.gather, [leaf.local for leaf in leaves]
        if self._accelerator.use_distributed:
            everywhere = _unpack_rows(gather(_pack(tensors)), tensors)
        else:
            everywhere = [gather(x) for x in tensors]
        for leaf, value in zip(leaves, everywhere, strict=True):
            leaf.arrive(value)

    def _compute(self) -> None:
        """Runs what was written down on the device; only the scalars stay, packed."""
        self.communicate()
        if self._items:
            self._packed.append((_pack([item.compute() for item in self._items]), self._items))
            self._items = []

    def read(self) -> None:
        """One transfer for all numbers; from here on they are known."""
        self._compute()
        if self._packed:
            host = torch.cat([buffer for buffer, _ in self._packed]).cpu()
            items = [item for _, some in self._packed for item in some]
            sizes = [item.dtype.itemsize for item in items]
            for item, piece in zip(items, host.split(sizes), strict=True):
                item.arrive(piece.clone().view(item.dtype).tolist()[0])
            self._packed = []
        results, self._results = self._results, []
        for number in results:
            number.arrive(number.compute())


def _pack(tensors: Sequence[Tensor]) -> Tensor:  # [bytes]
    """Of any dtypes, so that one collective and one transfer do."""
    device = tensors[0].device
    flat = [x.detach().to(device).contiguous().view(-1) for x in tensors]
    return torch.cat([x.view(torch.uint8) for x in flat])


def _unpack_rows(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What gathering each of `tensors` alone gives, of all processes' packed ones."""
    sizes = [x.numel() * x.dtype.itemsize for x in tensors]
    processes = buffer.numel() // sum(sizes)
    found = []
    for x, part in zip(tensors, buffer.view(processes, -1).split(sizes, 1), strict=True):
        # Memory of its own: the order in which a GPU sums depends on the alignment.
        own = part.clone(memory_format=torch.contiguous_format).view(-1).view(x.dtype)
        rows = processes * prod(x.shape[:1])
        found.append(own.view(rows, *x.shape[1:]))
    return found
