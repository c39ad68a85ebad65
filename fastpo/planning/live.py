"""Bytes of all tensors that are alive, by what they are, and the most there ever were.

Every storage an operation returns is counted until nobody holds it. On fake tensors nothing is
allocated and nothing computed, so a step of a large model takes seconds; on real ones the same
code counts the same bytes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """label: what new storages are counted as."""

    def __init__(self) -> None:
        super().__init__()
        self.label = "other"
        self.bytes: Counter[str] = Counter()
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._held: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self._count(x)
        return out

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()
        self._held[key] = (self.label, size)
        weakref.finalize(storage, self._gone, key)
        self._add(self.label, size)

    def _gone(self, key: int) -> None:
        label, size = self._held.pop(key)
        self._add(label, -size)

    def _add(self, label: str, size: int) -> None:
        self.bytes[label] += size
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, +self.bytes

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        for x in tensors:
            key = x.untyped_storage()._cdata
            if key in self._held:
                old, size = self._held[key]
                self._held[key] = (label, size)
                self.bytes[old] -= size
                self.bytes[label] += size

    def shrink(self, x: Tensor, size: int) -> None:
        """So many bytes of it are somebody else's from now on."""
        key = x.untyped_storage()._cdata
        label, whole = self._held[key]
        self._held[key] = label, whole - size
        self._add(label, -size)

    @contextmanager
    def as_(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def passing(self, label: str, size: int) -> None:
        """Memory that an operation takes and gives back without a tensor that is seen here."""
        self._add(label, size)
        self._add(label, -size)

    def forget_peak(self) -> None:
        self.peak, self.at_peak = self.now, +self.bytes
