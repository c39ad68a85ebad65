"""x·Wᵀ whose epilogue is already a softmax: exponentials beside each row's target, and their sums.

In place of the three lines

    z = logits(x @ w.t())                                  # [n, vocab]
    e = torch.exp(z - z_of_label).masked_fill(is_label, 0)
    others = e.sum(1)

the products are never written. `anchored_fwd` reads x [n, H] and w [vocab, H] and writes a partial
sum per row and block of words, of each statistic that is asked for, and E [n, vocab] in its dtype
where that is wanted. anchored_fold.py adds the partial sums up; a row whose exponentials, or their
squares, would leave float32's range is computed again by anchored_again.py.

All arithmetic but the target's is float32, in powers of two: rows.py says what for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._blocks import PER_BATCH, GemmBlocks
from .rows import FIXED_ROUNDING, LOG2_E, LOG_FLOOR, LOWEST

# What an epilogue can add up in passing, see _joined; bit i of WANTED asks for the i-th.
SUMS = tl.constexpr(5)


class Exponentials(NamedTuple):
    """Where E lies: `words` columns of all rows one after the other, then those of the next words.

    The last columns of the last part are no words. All rows start at multiples of 256 cells.
    """

    cells: Tensor  # [⌈vocab / words⌉·rows·words]
    rows: int  # of the whole
    words: int  # of one part, a multiple of 256
    first: int  # the row that the product's first one is
    stored: int  # how many of the product's rows are stored


@triton.jit
def _column(labels_ptr, rows, mask, vocab):
    """Column of each row's label; -1 or vocab where it has none, before int32."""
    label = tl.zeros_like(rows) - 1
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows, mask=mask, other=-1)
        label = tl.minimum(tl.maximum(label, -1), vocab).to(tl.int32)
    return label


@triton.jit
def _place(i, n, vocab, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """First row and column of the i-th block: GROUP blocks of rows share their words in L2."""
    blocks_m = tl.cdiv(n, BLOCK_M)
    blocks_v = tl.cdiv(vocab, BLOCK_V)
    group = i // (GROUP * blocks_v)
    height = tl.minimum(blocks_m - group * GROUP, GROUP)
    within = i % (GROUP * blocks_v)
    return (group * GROUP + within % height) * BLOCK_M, within // height * BLOCK_V


@triton.jit
def _products(
    x_ptr,
    w_ptr,
    m0,
    v0,
    n,
    vocab,
    H,
    stride_x,
    stride_w,
    EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[BLOCK_M, BLOCK_V] float32. Past the end the last row or word repeats: no masks."""
    h = tl.arange(0, BLOCK_H)
    m = tl.minimum(m0 + tl.arange(0, BLOCK_M), n - 1).to(tl.int64)
    v = tl.minimum(v0 + tl.arange(0, BLOCK_V), vocab - 1).to(tl.int64)
    x_ptr += m[:, None] * stride_x + h[None, :]
    w_ptr += v[None, :] * stride_w + h[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        if EVEN_H:
            x, w = tl.load(x_ptr), tl.load(w_ptr)
        else:
            x = tl.load(x_ptr, mask=h[None, :] < H - start, other=0.0)
            w = tl.load(w_ptr, mask=h[:, None] < H - start, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptr += BLOCK_H
        w_ptr += BLOCK_H
    return acc


@triton.jit
def _halves(x):
    """Left and right columns of each [M, V] of a tuple."""
    M: tl.constexpr = x[0].shape[0]
    V: tl.constexpr = x[0].shape[1]
    parts = ()
    for i in tl.static_range(len(x)):
        parts = parts + x[i].reshape(M, 2, V // 2).permute(0, 2, 1).split()
    return parts


@triton.jit
def _cells(acc, v, base, column, special, bias_ptr, vocab, slope):
    """Cell by cell, over the others: e = exp2(acc·slope - base) and its exponent; and acc.

    special: the cells may include a label, or columns that are no words.
    """
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + v, mask=v < vocab, other=0.0)[None, :]
    # One rounding, at the size of the difference.
    d = tl.fma(acc, slope, -base[:, None])
    e = tl.exp2(d)
    if special:
        out = (v[None, :] == column[:, None]) | (v[None, :] >= vocab)
        e = tl.where(out, 0.0, e)
        d = tl.where(out, LOWEST, d)
        acc = tl.where(v[None, :] < vocab, acc, 0.0)
    return e, d, acc


@triton.jit
def _nothing(M: tl.constexpr, V: tl.constexpr):
    """Where `_joined` starts."""
    zero = tl.zeros((M, V), tl.float32)
    return zero, zero, zero, zero, zero + LOWEST


@triton.jit
def _joined(sums, e, d, acc, bias_ptr):
    """Cell by cell: sums of e, e·log2 e, e² and acc, and the maximum of log2 e."""
    finite = d
    if bias_ptr is not None:
        # A word that a bias of -inf removes: 0·(-inf) is NaN.
        finite = tl.maximum(d, LOG_FLOOR * LOG2_E)
    return (
        sums[0] + e,
        tl.fma(e, finite, sums[1]),
        tl.fma(e, e, sums[2]),
        sums[3] + acc,
        tl.maximum(sums[4], d),
    )


@triton.jit
def _over_words(x):
    return tl.sum(x[0], 1), tl.sum(x[1], 1), tl.sum(x[2], 1), tl.sum(x[3], 1), tl.max(x[4], 1)


@triton.jit
def _store(e_ptr, e, m0, v0, mask, rows, words):
    """e [M, V] of row m0 of the whole and column v0 on, where `mask` says so; see Exponentials."""
    M: tl.constexpr = e.shape[0]
    V: tl.constexpr = e.shape[1]
    part = v0 // words
    # int64 to the block, int32 within it: wide addresses of all cells would not fit in registers.
    e_ptr += (part.to(tl.int64) * rows + m0) * words + (v0 - part * words)
    m, v = tl.arange(0, M)[:, None], tl.arange(0, V)[None, :]
    tl.store(e_ptr + (m * words + v), e, mask=mask[:, None])


@triton.jit
def _finish_block(
    acc,
    m0,
    v0,
    labels_ptr,
    bias_ptr,
    base_ptr,
    partial_ptr,
    e_ptr,
    n,
    vocab,
    stored,
    row,
    rows,
    words,
    stride_sum,
    slope,
    WANTED: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Partial sums of a block of products, and e where it is stored.

    In parts of its columns: the whole block's cells beside its products would not fit in registers.
    Parts are joined cell by cell, so that threads exchange sums once a block.
    """
    PARTS: tl.constexpr = 2**HALVINGS
    m = m0 + tl.arange(0, BLOCK_M)
    base = tl.load(base_ptr + m, mask=m < n, other=0.0)
    column = _column(labels_ptr, m, m < n, vocab)
    inside = (column >= v0) & (column < v0 + BLOCK_V)
    special = (tl.max(inside.to(tl.int32), 0) != 0) | (v0 + BLOCK_V > vocab)
    parts, cells = (acc,), _nothing(BLOCK_M, BLOCK_V // PARTS)
    for _ in tl.static_range(HALVINGS):
        parts = _halves(parts)
    for i in tl.static_range(PARTS):
        v1 = v0 + i * (BLOCK_V // PARTS)
        v = v1 + tl.arange(0, BLOCK_V // PARTS)
        e, d, u = _cells(parts[i], v, base, column, special, bias_ptr, vocab, slope)
        cells = _joined(cells, e, d, u, bias_ptr)
        if e_ptr is not None:
            _store(e_ptr, e, row + m0, v1, m < stored, rows, words)
    if partial_ptr is not None:
        sums = _over_words(cells)
        # int64: blocks·n passes 2**31
        partial_ptr += (v0 // BLOCK_V).to(tl.int64) * n
        for i in tl.static_range(SUMS):
            if (WANTED >> i) & 1:
                tl.store(partial_ptr + i * stride_sum + m, sums[i], mask=m < n)


@triton.jit(**PER_BATCH)
def anchored_fwd_kernel(
    x_ptr,  # [n, H]
    w_ptr,  # [vocab, H]
    labels_ptr,  # [n] int64, or None
    bias_ptr,  # [vocab] float32, or None
    base_ptr,  # [n] float32: e = exp2(acc·slope - base)
    partial_ptr,  # [SUMS, blocks, n] float32, those WANTED are written, or None
    e_ptr,  # see Exponentials, or None
    n,
    vocab,
    H,
    stored,
    row,
    rows,
    words,
    stride_sum,
    stride_x,
    stride_w,
    slope,
    WANTED: tl.constexpr,
    EVEN_H: tl.constexpr,
    HALVINGS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    m0, v0 = _place(tl.program_id(0), n, vocab, GROUP, BLOCK_M, BLOCK_V)
    acc = _products(
        x_ptr, w_ptr, m0, v0, n, vocab, H, stride_x, stride_w, EVEN_H, BLOCK_M, BLOCK_V, BLOCK_H
    )
    _finish_block(
        acc, m0, v0, labels_ptr, bias_ptr, base_ptr, partial_ptr, e_ptr, n, vocab, stored, row,
        rows, words, stride_sum, slope, WANTED, HALVINGS, BLOCK_M, BLOCK_V,
    )  # fmt: skip


@triton.jit(**PER_BATCH)
def anchored_fwd_tma_kernel(
    x_desc,  # [n, H] in blocks [BLOCK_M, BLOCK_H]
    w_desc,  # [vocab, H] in blocks [BLOCK_V, BLOCK_H]
    labels_ptr,
    bias_ptr,
    base_ptr,
    partial_ptr,
    e_ptr,
    n,
    vocab,
    H,
    stored,
    row,
    rows,
    words,
    stride_sum,
    slope,
    WANTED: tl.constexpr,
    HALVINGS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`anchored_fwd_kernel` with one program per multiprocessor, and descriptors that load."""
    count = tl.cdiv(n, BLOCK_M) * tl.cdiv(vocab, BLOCK_V)
    for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
        m0, v0 = _place(i, n, vocab, GROUP, BLOCK_M, BLOCK_V)
        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for h in range(0, H, BLOCK_H):
            acc = tl.dot(x_desc.load([m0, h]), w_desc.load([v0, h]).T, acc)
        _finish_block(
            acc, m0, v0, labels_ptr, bias_ptr, base_ptr, partial_ptr, e_ptr, n, vocab, stored,
            row, rows, words, stride_sum, slope, WANTED, HALVINGS, BLOCK_M, BLOCK_V,
        )  # fmt: skip


def anchored_fwd(
    x: Tensor,  # [n, H]
    w: Tensor,  # [vocab, H]
    labels: Tensor | None,  # [n] int64; None: no word is left out
    bias: Tensor | None,  # [vocab] float32
    base: Tensor,  # [n] float32: e = exp2(z·log2 e - base)
    partial: Tensor | None,  # [SUMS, ⌈vocab / blocks.v⌉, n] float32, written: the first and `stats`
    e: Exponentials | None,  # written, 0 at the label and where no words are
    blocks: GemmBlocks,
    programs: int,  # of a persistent kernel
    *,
    factor: float,  # z = factor·products
    stats: int,  # bits of STATS in fastpo/ops/rows/backend.py
) -> None:
    n, H = x.shape
    vocab = len(w)
    count = triton.cdiv(n, blocks.m) * triton.cdiv(vocab, blocks.v)
    operands: tuple = (x, w)
    grid, strides, named = count, (x.stride(0), w.stride(0)), {"EVEN_H": H % blocks.h == 0}
    kernel = anchored_fwd_kernel
    if blocks.tma:
        x_desc = TensorDescriptor.from_tensor(x, [blocks.m, blocks.h])
        w_desc = TensorDescriptor.from_tensor(w, [blocks.v, blocks.h])
        operands, grid, strides, named = (x_desc, w_desc), min(count, programs), (), {}
        kernel = anchored_fwd_tma_kernel
    with torch.cuda.device_of(x):
        kernel[(grid,)](
            *operands,
            labels,
            bias,
            base,
            partial,
            None if e is None else e.cells,
            n,
            vocab,
            H,
            0 if e is None else e.stored,
            0 if e is None else e.first,
            0 if e is None else e.rows,
            0 if e is None else e.words,
            0 if partial is None else partial.stride(0),
            *strides,
            factor * LOG2_E.value,
            WANTED=1 + 2 * stats,
            HALVINGS=blocks.halvings,
            GROUP=blocks.group,
            BLOCK_M=blocks.m,
            BLOCK_V=blocks.v,
            BLOCK_H=blocks.h,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            **named,
            **FIXED_ROUNDING,
        )
