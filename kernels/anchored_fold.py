"""Partial sums of anchored.py added up to what the state of a row says.

Reads blocks·n partial sums per statistic and writes the rows' state. A sum out of range marks its
row for anchored_again.py; the host neither knows nor waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import PER_BATCH
from .anchored import SUMS, Exponentials
from .rows import (
    BEFORE,
    FIXED_ROUNDING,
    LN_2,
    LOG2_E,
    LOWEST,
    MAX,
    MOMENT,
    OTHERS,
    SQUARES,
    SUM,
)

_ROWS = 64  # of one program
LARGEST_OWN = tl.constexpr(100.0)  # an infinite sum times 2**-100 is infinite


@triton.jit
def _fold(
    partial_ptr,
    m,
    rows,
    blocks,
    stride_partial,
    LARGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Over blocks of words, always in the same order: sums, or maxima."""
    found = tl.full((BLOCK_M,), LOWEST if LARGEST else 0.0, tl.float32)
    for start in range(0, blocks, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < blocks)[:, None] & rows[None, :]
        address = partial_ptr + p.to(tl.int64)[:, None] * stride_partial + m[None, :]
        part = tl.load(address, mask=mask, other=LOWEST if LARGEST else 0.0)
        found = tl.maximum(found, tl.max(part, 0)) if LARGEST else found + tl.sum(part, 0)
    return found


@triton.jit(**PER_BATCH)
def anchored_fold_kernel(
    partial_ptr,  # [sums, blocks, n] float32, rows `stride_partial` apart
    maxima_ptr,  # [blocks, n] float32 of z·log2 e: only rows out of range, beside these; or None
    labels_ptr,  # [n] int64
    origin_ptr,  # [n] float32, where there are no maxima
    state_ptr,  # [7, n] float32, written: beside origin·factor in place of the maximum
    offset_ptr,  # [n] float32, written: E, of rows not stored MAX, is at origin·factor plus this
    e_ptr,  # see Exponentials, the label's cells are written, or None
    n,
    vocab,
    blocks,
    stored,
    row,
    height,
    words,
    stride_sum,
    stride_partial,
    stride_state,
    factor,
    slope,
    largest,
    WANTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = m < n
    if maxima_ptr is not None:
        others = tl.load(state_ptr + OTHERS * stride_state + m, mask=rows, other=0.0)
        rows = rows & (others > largest)
        base = _fold(maxima_ptr, m, rows, blocks, n, True, BLOCK_M, BLOCK_P)
        origin = base / slope
    else:
        origin = tl.load(origin_ptr + m, mask=rows, other=0.0)
        base = origin * slope
    # log2 of what the origin's own exponential is: not 1, because its exponent was rounded. It is
    # far from 1 beside a label that a bias of -1e10 removes: the sum, which is infinite then, must
    # not become NaN by 2**-own = 0, or its row would not be computed again.
    own = tl.minimum(tl.maximum(tl.fma(origin, slope, -base), -LARGEST_OWN), LARGEST_OWN)
    shrink = tl.exp2(-own)
    mass = _fold(partial_ptr, m, rows, blocks, stride_partial, False, BLOCK_M, BLOCK_P)
    tl.store(state_ptr + OTHERS * stride_state + m, mass * shrink, mask=rows)
    # A NaN among the others shows in their sum alone, and no label is the best word beside it.
    maximum = tl.where(mass == mass, origin * factor, mass)
    tl.store(state_ptr + MAX * stride_state + m, maximum, mask=rows)
    offset = tl.where(m < stored, -own * LN_2, -tl.fma(origin, factor, -maximum))
    tl.store(offset_ptr + m, offset, mask=rows)
    for i in tl.static_range(1, SUMS):
        if (WANTED >> i) & 1:
            part_ptr = partial_ptr + i * stride_sum
            part = _fold(part_ptr, m, rows, blocks, stride_partial, i == 4, BLOCK_M, BLOCK_P)
            if i == 1:
                moment = (part - own * mass) * shrink * LN_2
                tl.store(state_ptr + MOMENT * stride_state + m, moment, mask=rows)
            if i == 2:
                squares = part * shrink * shrink
                tl.store(state_ptr + SQUARES * stride_state + m, squares, mask=rows)
            if i == 3:
                tl.store(state_ptr + SUM * stride_state + m, part * factor, mask=rows)
            if i == 4 and maxima_ptr is None:
                # Rows that move have another word above their label, and that is known by then.
                before = tl.where(part > own, float("inf"), -float("inf"))
                tl.store(state_ptr + BEFORE * stride_state + m, before, mask=rows)
    if e_ptr is not None:
        # d log p / dz of the label is what all others have together.
        label = tl.load(labels_ptr + m, mask=rows, other=-1)
        inside = rows & (m < stored) & (label >= 0) & (label < vocab)
        part = label // words
        cell = (part * height + row + m) * words + (label - part * words)
        tl.store(e_ptr + cell, -mass, mask=inside)


def anchored_fold(
    partial: Tensor,  # [SUMS, blocks, n] float32, or of the first sum alone
    maxima: Tensor | None,  # [blocks, n] float32: then only rows out of range are written
    labels: Tensor,  # [n] int64
    origin: Tensor,  # [n] float32
    state: Tensor,  # [7, n] float32, written but TARGET: see rows_fwd, with origin·factor as MAX
    offset: Tensor,  # [n] float32, written: what E or, of rows not stored, MAX is relative to
    e: Exponentials | None,  # the label's cells are written: minus the sum of the others
    *,
    vocab: int,
    factor: float,
    stats: int,
    largest: float,  # a sum above this is computed again
) -> None:
    n = len(labels)
    with torch.cuda.device_of(partial):
        anchored_fold_kernel[(triton.cdiv(n, _ROWS),)](
            partial,
            maxima,
            labels,
            origin,
            state,
            offset,
            None if e is None else e.cells,
            n,
            vocab,
            partial.shape[1],
            0 if e is None else e.stored,
            0 if e is None else e.first,
            0 if e is None else e.rows,
            1 if e is None else e.words,
            partial.stride(0),
            partial.stride(1),
            state.stride(0),
            factor,
            factor * LOG2_E.value,
            largest,
            WANTED=1 + 2 * stats,
            BLOCK_M=_ROWS,
            BLOCK_P=32,
            num_warps=4,
            **FIXED_ROUNDING,
        )
