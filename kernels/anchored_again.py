"""Rows of anchored.py whose exponentials left float32's range, because their label is far below.

Two launches that look at all rows and, nearly always, leave at once. Where a row is out of range
its block of rows is multiplied with the words again: once for the maximum, which becomes the row's
origin in anchored_fold.py, once for the exponentials beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import PER_BATCH, repair_blocks
from .anchored import (
    SUMS,
    Exponentials,
    _cells,
    _column,
    _joined,
    _nothing,
    _over_words,
    _products,
    _store,
)
from .anchored_fold import _fold
from .rows import FIXED_ROUNDING, LOG2_E

WORDS = 8192  # of one program


@triton.jit(**PER_BATCH)
def anchored_again_kernel(
    x_ptr,  # [n, H]
    w_ptr,  # [vocab, H]
    labels_ptr,  # [n] int64
    bias_ptr,  # [vocab] float32, or None
    others_ptr,  # [n] float32: rows above `largest` are computed again
    maxima_ptr,  # [programs, n] float32 of z·log2 e, written without partial sums, read with them
    partial_ptr,  # [SUMS, programs, n] float32, written; or None
    e_ptr,  # see Exponentials, or None
    n,
    vocab,
    H,
    stored,
    row,
    height,
    words,
    stride_sum,
    stride_x,
    stride_w,
    slope,
    largest,
    WANTED: tl.constexpr,
    EVEN_H: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    m0, part = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    m = m0 + tl.arange(0, BLOCK_M)
    again = tl.load(others_ptr + m, mask=m < n, other=0.0) > largest  # NaN: no origin mends it
    if tl.max(again.to(tl.int32), 0) != 0:
        column = _column(labels_ptr, m, m < n, vocab)
        first, last = part * WORDS, tl.minimum((part + 1) * WORDS, vocab)
        base = tl.zeros((BLOCK_M,), tl.float32)
        if partial_ptr is not None:
            programs = tl.num_programs(1)
            base = _fold(maxima_ptr, m, again, programs, n, True, BLOCK_M, 32)
        cells = _nothing(BLOCK_M, BLOCK_V)
        for v0 in range(first, last, BLOCK_V):
            acc = _products(
                x_ptr, w_ptr, m0, v0, n, vocab, H, stride_x, stride_w, EVEN_H, BLOCK_M, BLOCK_V,
                BLOCK_H,
            )  # fmt: skip
            v = v0 + tl.arange(0, BLOCK_V)
            e, d, u = _cells(acc, v, base, column, True, bias_ptr, vocab, slope)
            cells = _joined(cells, e, d, u, bias_ptr)
            if e_ptr is not None:
                _store(e_ptr, e, row + m0, v0, again & (m < stored), height, words)
        sums = _over_words(cells)
        if partial_ptr is None:
            tl.store(maxima_ptr + part.to(tl.int64) * n + m, sums[4], mask=again)
        else:
            sum_ptr = partial_ptr + part.to(tl.int64) * n + m
            for i in tl.static_range(SUMS):
                if (WANTED >> i) & 1:
                    tl.store(sum_ptr + i * stride_sum, sums[i], mask=again)


def anchored_again(
    x: Tensor,  # [n, H]
    w: Tensor,  # [vocab, H]
    labels: Tensor,  # [n] int64
    bias: Tensor | None,  # [vocab] float32
    others: Tensor,  # [n] float32
    maxima: Tensor,  # [⌈vocab / WORDS⌉, n] float32, written without `partial`, read with it
    partial: Tensor | None,  # [SUMS, ⌈vocab / WORDS⌉, n] float32, written
    e: Exponentials | None,  # written with `partial`
    *,
    factor: float,
    stats: int,
    largest: float,
) -> None:
    """Of rows with others > largest alone; of all others nothing is read or written."""
    n, H = x.shape
    blocks = repair_blocks()
    with torch.cuda.device_of(x):
        anchored_again_kernel[(triton.cdiv(n, blocks.m), len(maxima))](
            x,
            w,
            labels,
            bias,
            others,
            maxima,
            partial,
            None if e is None else e.cells,
            n,
            len(w),
            H,
            0 if e is None else e.stored,
            0 if e is None else e.first,
            0 if e is None else e.rows,
            0 if e is None else e.words,
            0 if partial is None else partial.stride(0),
            x.stride(0),
            w.stride(0),
            factor * LOG2_E.value,
            largest,
            WANTED=16 if partial is None else 1 + 2 * stats,
            EVEN_H=H % blocks.h == 0,
            WORDS=WORDS,
            BLOCK_M=blocks.m,
            BLOCK_V=blocks.v,
            BLOCK_H=blocks.h,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            **FIXED_ROUNDING,
        )
