"""Huge pages for a large fresh buffer on a CPU: its first touch costs a quarter as much."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_LEAST = 32 * 2**20  # the C library gives larger blocks a mapping of their own


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if _ADVICE is None or sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def prefer_huge(buffer: Tensor) -> Tensor:
    """The same buffer. Only advice: a kernel that does not follow it changes speed, not results."""
    advise = _madvise()
    if advise is None or _ADVICE is None or buffer.device.type != "cpu" or buffer.nbytes < _LEAST:
        return buffer
    page = mmap.PAGESIZE
    start = -(-buffer.data_ptr() // page) * page
    stop = (buffer.data_ptr() + buffer.nbytes) // page * page
    advise(start, stop - start, _ADVICE)
    return buffer
