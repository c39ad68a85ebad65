"""The anchored product on CUTLASS: tensors to the addresses that csrc/cuda/anchored.cu takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .architecture import is_hopper
from .native import compiled

_C, _MISSING = compiled()

_ROWS = 128  # of a block; two of them read their words together
_ALIGNMENT = 16  # bytes, of what the hardware copies as blocks


class Schedule(NamedTuple):
    pingpong: bool  # one warp group multiplies while the other takes exponentials
    swizzle: int  # blocks side by side before those behind them: 1, 2, 4 or 8
    words_first: bool  # whether behind is along the words, or along the rows


def schedule() -> Schedule:
    """Of all products. No GPU timing has chosen it yet.

    Depends on nothing: how words are cut is the order of a row's sums, see kernels/_blocks.py.
    """
    # Predicted in docs/kernels.md. Eight blocks of words side by side: x, which passes through the
    # cache of 50 MB at H 4096, is read for every 1,536 words anew.
    return Schedule(pingpong=True, swizzle=8, words_first=False)


def block_words(pingpong: bool) -> int:
    """How the kernel cuts the words, as `anchored_words` of anchored.h says."""
    return 192 if pingpong else 256


def padded_blocks(n: int, v: int, words: int, swizzle: int) -> tuple[int, int]:
    """Blocks of rows and of words that are multiplied, those beyond the end among them."""
    return _up(-(-n // _ROWS), 2 * swizzle), _up(-(-v // words), swizzle)


def swizzled(n: int, v: int, words: int, most: int) -> int:
    """The largest swizzle that adds at most a 200th of blocks beyond the end."""

    def count(swizzle: int) -> int:
        rows, columns = padded_blocks(n, v, words, swizzle)
        return rows * columns

    found = 1
    while 2 * found <= most and 200 * count(2 * found) <= 201 * count(1):
        found *= 2
    return found


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


def unavailable(device: torch.device) -> str | None:
    if _C is None:
        return _MISSING
    if not _C.has_cutlass:
        return "fastpo._C was built without CUTLASS; see csrc/cuda/cuda.cmake"
    if not is_hopper(device):
        return f"runs on devices of compute capability 9.0, got {device}"
    return None


def serves(x: Tensor, words: Tensor, bias: Tensor | None) -> bool:
    """All rows, those of e too, start where blocks can be copied, and none ends within a copy.

    The same whether e is wanted or not, so that all modes have the same bits.
    """
    if x.dtype != torch.bfloat16 or words.dtype != torch.bfloat16:
        return False
    aligned = bias is None or bias.data_ptr() % _ALIGNMENT == 0
    whole = all(size * x.itemsize % _ALIGNMENT == 0 for size in words.shape)
    return aligned and whole and in_blocks(x) and in_blocks(words)


def in_blocks(rows: Tensor) -> bool:
    """Whether the hardware can copy blocks of them: rows that lie apart, from such places on."""
    starts = rows.data_ptr() % _ALIGNMENT == 0 == rows.stride(0) * rows.itemsize % _ALIGNMENT
    return starts and rows.stride(0) >= rows.shape[1]


def product(
    x: Tensor,  # [n, H] bfloat16
    words: Tensor,  # [v, H] bfloat16
    columns: Tensor | None,  # [n] int32, of each row's label, outside [0, v) where it is not here
    bias: Tensor | None,  # [v] float32
    base: Tensor,  # [n] float32
    e: Tensor | None,  # [stored, v] bfloat16, written: of the first rows
    slope: float,
    sums: int,  # the first one alone, or all
    multiprocessors: int,
) -> Tensor:  # [sums, blocks of words, n] float32
    """Row sums of e = exp2((x·words + bias)·slope - base) and statistics, see anchored.h."""
    assert _C is not None, _MISSING
    n, v, stored = len(x), len(words), 0 if e is None else len(e)
    chosen = schedule()
    width = block_words(chosen.pingpong)
    blocks = -(-v // width)
    found = x.new_empty(sums, blocks, n, dtype=torch.float32)
    for a, b, into in ((0, stored, e), (stored, n, None)):
        if a == b:
            continue
        partial = x.new_empty(sums, blocks, _up(b - a, _ROWS), dtype=torch.float32)
        work = _C.AnchoredTile(
            x=x[a:b].data_ptr(),
            x_stride=x.stride(0),
            words=words.data_ptr(),
            words_stride=words.stride(0),
            n=b - a,
            v=v,
            h=x.shape[1],
            columns=0 if columns is None else columns[a:b].data_ptr(),
            base=base[a:b].data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            slope=slope,
            sums=sums,
            partial=partial.data_ptr(),
            e=0 if into is None else into.data_ptr(),
            e_stride=0 if into is None else into.stride(0),
            pingpong=chosen.pingpong,
            swizzle=swizzled(b - a, v, width, chosen.swizzle),
            words_first=chosen.words_first,
        )
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            _C.anchored_cuda(work, stream.device_index, multiprocessors, stream.cuda_stream)
        if b - a == n:
            return partial[:, :, :n]
        found[:, :, a:b] = partial[:, :, : b - a]
    return found
