"""The product on CUTLASS in plain PyTorch, to stand in for it where there is no GPU."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastpo.ops.rows import anchored_cutlass as cutlass


def matrix(address: int, rows: int, columns: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    bytes_ = ((rows - 1) * stride + columns) * dtype.itemsize
    memory = (ctypes.c_char * bytes_).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (stride, 1))


def product(work: SimpleNamespace, dtype: torch.dtype) -> None:
    """csrc/include/fastpo/anchored.h, of operands and exponentials in any dtype."""
    n, v, h, width = work.n, work.v, work.h, 192 if work.pingpong else 256
    x = matrix(work.x, n, h, work.x_stride, dtype).float()
    words = matrix(work.words, v, h, work.words_stride, dtype).float()
    u = x @ words.t()
    if work.bias:
        u += matrix(work.bias, 1, v, v, torch.float32)
    d = u * work.slope - matrix(work.base, 1, n, n, torch.float32).t()
    label = torch.zeros(n, v, dtype=torch.bool)
    if work.columns:
        label = matrix(work.columns, 1, n, n, torch.int32).t() == torch.arange(v)
    e = d.exp2().masked_fill(label, 0)
    blocks, rounded = -(-v // width), -(-n // 128) * 128
    cells = blocks * rounded
    partial = matrix(work.partial, work.sums, cells, cells, torch.float32)
    partial = partial.view(work.sums, blocks, rounded)
    parts = (e, e * d, e.square(), u, d.masked_fill(label, torch.finfo(torch.float32).min))
    for i, (into, part) in enumerate(zip(partial, parts, strict=False)):
        reduced = [block.amax(1) if i == 4 else block.sum(1) for block in part.split(width, 1)]
        into[:, :n] = torch.stack(reduced)
    if work.e:
        matrix(work.e, n, v, work.e_stride, dtype).copy_(e)


def stand_in(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[SimpleNamespace]:
    """What it is asked for."""
    found: list[SimpleNamespace] = []

    def run(work: SimpleNamespace, device: int, multiprocessors: int, stream: int) -> None:
        found.append(work)
        product(work, dtype)

    native = SimpleNamespace(AnchoredTile=SimpleNamespace, anchored_cuda=run)
    monkeypatch.setattr(cutlass, "_C", native)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    stream = SimpleNamespace(device_index=0, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    return found
