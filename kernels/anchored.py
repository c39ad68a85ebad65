"""x·Wᵀ whose epilogue is already a softmax: exponentials beside each row's target, and their sums.

In place of the three lines

    z = logits(x @ w.t())                                  # [n, width]
    e = torch.exp(z - z_of_label).masked_fill(is_label, 0)
    others += e.sum(1)

the products are never written. `anchored_fwd` reads x [n, H] and w [width, H] and writes a partial
sum per row and block of words, of each statistic that is asked for, and E [n, width] in its dtype
where that is wanted. anchored_fold.py adds the partial sums up. A row whose exponentials, or their
squares, would leave float32's range, because its label is more than 34 nats below the others, is
computed again there.

All arithmetic but the target's is float32, in powers of two: rows.py says what for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._blocks import GemmBlocks
from .rows import FIXED_ROUNDING, LOG2_E, LOG_FLOOR, _tanh

# What an epilogue can add up in passing, see _epilogue; bit i of WANTED asks for the i-th.
SUMS = tl.constexpr(5)


@triton.jit
def _u(x, scale, SOFTCAP: tl.constexpr):
    """u with z = u·post and z·log2 e = u·slope: x itself, or tanh(scale·x)."""
    if SOFTCAP:
        x = _tanh(x * scale)
    return x


@triton.jit
def _columns(labels_ptr, rows, mask, first, width):
    """Column of each row's label in this tile; -1 or width where it is not, before int32."""
    column = tl.load(labels_ptr + rows, mask=mask, other=-1) - first
    return tl.minimum(tl.maximum(column, -1), width).to(tl.int32)


@triton.jit
def _place(i, n, width, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """First row and column of the i-th block: GROUP blocks of rows share their words in L2."""
    blocks_m = tl.cdiv(n, BLOCK_M)
    blocks_v = tl.cdiv(width, BLOCK_V)
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
    width,
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
    v = tl.minimum(v0 + tl.arange(0, BLOCK_V), width - 1).to(tl.int64)
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
def _epilogue(
    acc,
    v,
    origin,
    column,
    bias_ptr,
    width,
    scale,
    slope,
    WANTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD_CAP: tl.constexpr,
):
    """SUMS sums over the row, and what is stored of e = exp(z - origin·post), cell by cell.

    Sums of e, e·log2 e and e² over the others, of u over all words, and the number of words above
    the label. A sum whose bit is not WANTED is the first one again.
    """
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + v, mask=v < width, other=0.0)[None, :]
    u = _u(acc, scale, SOFTCAP)
    # The difference first: u·slope alone would round at the size of the logits.
    d = (u - origin[:, None]) * slope
    e = tl.where((v[None, :] == column[:, None]) | (v[None, :] >= width), 0.0, tl.exp2(d))
    mass = tl.sum(e, 1)
    moment, squares, total, beaten = mass, mass, mass, mass
    if WANTED & 2:
        # The floor keeps 0·(-inf) out.
        moment = tl.sum(e * tl.maximum(d, LOG_FLOOR * LOG2_E), 1)
    if WANTED & 4:
        squares = tl.sum(e * e, 1)
    if WANTED & 8:
        total = tl.sum(tl.where(v[None, :] < width, u, 0.0), 1)
    if WANTED & 16:
        beaten = tl.sum(tl.where(e > 1.0, 1.0, 0.0), 1)
    stored = e
    if FOLD_CAP:
        stored = e * tl.fma(-u, u, 1.0)
    return (mass, moment, squares, total, beaten), stored


@triton.jit
def _added(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4]


@triton.jit
def _store(e_ptr, e, m0, v0, rows, width, stride):
    """e [M, V] from row m0 and column v0 on, where `rows` says so."""
    M: tl.constexpr = e.shape[0]
    V: tl.constexpr = e.shape[1]
    # int64 to the block, int32 within it: wide addresses of all cells would not fit in registers.
    e_ptr += m0.to(tl.int64) * stride + v0
    m, v = tl.arange(0, M)[:, None], tl.arange(0, V)[None, :]
    tl.store(e_ptr + (m * stride + v), e, mask=rows[:, None] & (v < width - v0))


@triton.jit
def _finish_block(
    acc,
    m0,
    v0,
    labels_ptr,
    bias_ptr,
    origin_ptr,
    partial_ptr,
    e_ptr,
    n,
    width,
    stored,
    first,
    stride_sum,
    stride_e,
    scale,
    slope,
    WANTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD_CAP: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Partial sums of a block of products, and e where it is stored.

    In parts of its columns: the whole block's cells beside its products would not fit in registers.
    """
    PARTS: tl.constexpr = 2**HALVINGS
    m = m0 + tl.arange(0, BLOCK_M)
    origin = tl.load(origin_ptr + m, mask=m < n, other=0.0)
    column = _columns(labels_ptr, m, m < n, first, width)
    parts = (acc,)
    for _ in tl.static_range(HALVINGS):
        parts = _halves(parts)
    for i in tl.static_range(PARTS):
        v1 = v0 + i * (BLOCK_V // PARTS)
        v = v1 + tl.arange(0, BLOCK_V // PARTS)
        part, e = _epilogue(
            parts[i], v, origin, column, bias_ptr, width, scale, slope, WANTED, SOFTCAP, FOLD_CAP
        )
        sums = part if i == 0 else _added(sums, part)  # noqa: F821
        if e_ptr is not None:
            _store(e_ptr, e, m0, v1, m < stored, width, stride_e)
    # int64: blocks·n passes 2**31
    partial_ptr += (v0 // BLOCK_V).to(tl.int64) * n
    for i in tl.static_range(SUMS):
        if (WANTED >> i) & 1:
            tl.store(partial_ptr + i * stride_sum + m, sums[i], mask=m < n)


@triton.jit
def anchored_fwd_kernel(
    x_ptr,  # [n, H]
    w_ptr,  # [width, H]
    labels_ptr,  # [n] int64
    bias_ptr,  # [width] float32, from the tile's first word on, or None
    origin_ptr,  # [n] float32
    partial_ptr,  # [SUMS, blocks, n] float32, those WANTED are written
    e_ptr,  # [stored, width], written, or None
    n,
    width,
    H,
    stored,
    first,
    stride_sum,
    stride_x,
    stride_w,
    stride_e,
    scale,
    slope,
    WANTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD_CAP: tl.constexpr,
    EVEN_H: tl.constexpr,
    HALVINGS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    m0, v0 = _place(tl.program_id(0), n, width, GROUP, BLOCK_M, BLOCK_V)
    acc = _products(
        x_ptr, w_ptr, m0, v0, n, width, H, stride_x, stride_w, EVEN_H, BLOCK_M, BLOCK_V, BLOCK_H
    )
    _finish_block(
        acc, m0, v0, labels_ptr, bias_ptr, origin_ptr, partial_ptr, e_ptr, n, width, stored, first,
        stride_sum, stride_e, scale, slope, WANTED, SOFTCAP, FOLD_CAP, HALVINGS, BLOCK_M, BLOCK_V,
    )  # fmt: skip


@triton.jit
def anchored_fwd_tma_kernel(
    x_desc,  # [n, H] in blocks [BLOCK_M, BLOCK_H]
    w_desc,  # [width, H] in blocks [BLOCK_V, BLOCK_H]
    labels_ptr,
    bias_ptr,
    origin_ptr,
    partial_ptr,
    e_ptr,
    n,
    width,
    H,
    stored,
    first,
    stride_sum,
    stride_e,
    scale,
    slope,
    WANTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD_CAP: tl.constexpr,
    HALVINGS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`anchored_fwd_kernel` with one program per multiprocessor, and descriptors that load."""
    count = tl.cdiv(n, BLOCK_M) * tl.cdiv(width, BLOCK_V)
    for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
        m0, v0 = _place(i, n, width, GROUP, BLOCK_M, BLOCK_V)
        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for h in range(0, H, BLOCK_H):
            acc = tl.dot(x_desc.load([m0, h]), w_desc.load([v0, h]).T, acc)
        _finish_block(
            acc, m0, v0, labels_ptr, bias_ptr, origin_ptr, partial_ptr, e_ptr, n, width, stored,
            first, stride_sum, stride_e, scale, slope, WANTED, SOFTCAP, FOLD_CAP, HALVINGS, BLOCK_M,
            BLOCK_V,
        )  # fmt: skip


def anchored_fwd(
    x: Tensor,  # [n, H]
    w: Tensor,  # [width, H]
    labels: Tensor,  # [n] int64
    bias: Tensor | None,  # [V] float32
    origin: Tensor,  # [n] float32
    partial: Tensor,  # [SUMS, ⌈width / blocks.v⌉, n] float32, written: the first and `stats`
    e: Tensor | None,  # [stored, width], written: of the first `stored` rows
    first: int,  # word of the tile's first column
    blocks: GemmBlocks,
    programs: int,  # of a persistent kernel
    *,
    scale: float,
    post: float,
    softcap: bool,
    stats: int,  # bits of STATS in fastpo/ops/rows/backend.py
    fold_cap: bool,
) -> None:
    n, H = x.shape
    width = len(w)
    count = triton.cdiv(n, blocks.m) * triton.cdiv(width, blocks.v)
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
            None if bias is None else bias[first:],
            origin,
            partial,
            e,
            n,
            width,
            H,
            0 if e is None else len(e),
            first,
            partial.stride(0),
            *strides,
            0 if e is None else e.stride(0),
            scale,
            post * LOG2_E.value,
            WANTED=1 + 2 * stats,
            SOFTCAP=softcap,
            FOLD_CAP=softcap and fold_cap,
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
