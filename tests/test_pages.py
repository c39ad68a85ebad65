"""Advice about pages changes no value, and reaches only what is worth it."""

from __future__ import annotations

import pytest
import torch

from fastpo.ops import _pages


@pytest.mark.skipif(_pages._madvise() is None, reason="this system takes no advice")
def test_large_buffers_are_advised_whole_pages(monkeypatch):
    told = []
    advise = _pages._madvise()
    monkeypatch.setattr(_pages, "_madvise", lambda: lambda *x: told.append((x, advise(*x))))
    buffer = torch.ones(_pages._LEAST // 4 + 5)
    assert _pages.prefer_huge(buffer) is buffer
    assert bool((buffer == 1).all())
    ((start, size, _), result) = told[0]
    assert start % _pages.mmap.PAGESIZE == size % _pages.mmap.PAGESIZE == 0
    assert buffer.data_ptr() <= start
    assert start + size <= buffer.data_ptr() + buffer.nbytes
    assert result == 0, "the kernel refused"


def test_small_buffers_are_left_alone(monkeypatch):
    monkeypatch.setattr(_pages, "_madvise", lambda: pytest.fail)
    buffer = torch.empty(1000)
    assert _pages.prefer_huge(buffer) is buffer
