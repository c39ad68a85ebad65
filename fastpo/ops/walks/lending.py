"""Who may read what one forward has kept, and who may write d weight over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class Loan:
    """Of one forward. Several threads may run its backward at once, when they retain the graph."""

    def __init__(self) -> None:
        self._lock, self._readers, self._spent = Lock(), 0, False

    @contextmanager
    def claim(self, overwrites: bool) -> Iterator[tuple[bool, bool]]:
        """Whether this backward may read what was kept, and whether it may overwrite it, too.

        Decided before its walk: once for all who come later, and never while another one reads.
        """
        with self._lock:
            reads = not self._spent
            overwrites = overwrites and reads and not self._readers
            self._spent |= overwrites
            self._readers += reads
        try:
            yield reads, overwrites
        finally:
            with self._lock:
                self._readers -= reads
