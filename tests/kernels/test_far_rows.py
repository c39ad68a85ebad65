"""Rows more than 2**31 numbers apart, in memory of which only what is touched exists."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from _triton import MARKS

from fastpo.ops.rows import backend as R
from fastpo.ops.rows import triton as rows_triton

pytest.importorskip("triton")

from fastpo.kernels.anchored_label import anchored_label

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="of the host's memory"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory has to exist"),
    *MARKS,
]
APART, WIDTH = 2**30, 40
NORESERVE = 0x4000  # MAP_NORESERVE, which Python has from 3.13 on


def far_apart() -> torch.Tensor:
    """[3, WIDTH], whose last row int32 would seek as far in front of the first."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, 4 * (4 * APART + WIDTH), flags=flags)
    whole = torch.frombuffer(memory, dtype=torch.float32)
    return whole.as_strided((3, WIDTH), (APART, 1), 2 * APART)


def test_rows_far_apart():
    g = torch.Generator().manual_seed(0)
    tile, grads = torch.randn(3, WIDTH, generator=g), torch.rand(R.GRADS, 3, generator=g)
    labels, before, after = torch.tensor([3, 5, 7]), torch.zeros(3), torch.ones(3)
    found = []
    for x in (tile.clone(), far_apart().copy_(tile)):
        state = R.filled_rows(R.INITIAL_STATE, 3, x.device)
        rows_triton.forward(x, 0, labels, None, state, R.LogitMap(), 15, None, None, False)
        rows_triton.backward(x, None, 0, labels, None, grads, R.LogitMap(), True, x)
        rows_triton.rescale(x, before, after)
        anchored_label(x, after, labels, 0)
        found.append((state, x))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
