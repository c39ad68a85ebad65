"""Partial sums of anchored.py added up, and rows whose exponentials left float32's range redone.

Reads blocks·n partial sums and updates 2 numbers a row. A program that finds a row out of range
multiplies its block of rows with the tile's words again, twice: for the maximum, which becomes the
row's origin, and for the exponentials beside it. The host neither knows nor waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import repair_blocks
from .anchored import _columns, _epilogue, _products, _store, _u
from .rows import FIXED_ROUNDING, LOG2_E, LOWEST

# A sum above this is computed again: 2**27 times as much still fits in float32 and bfloat16.
LARGEST_SUM = tl.constexpr(2.0**100)


@triton.jit
def anchored_fold_kernel(
    x_ptr,  # [n, H]
    w_ptr,  # [width, H]
    labels_ptr,  # [n] int64
    bias_ptr,  # [width] float32, from the tile's first word on, or None
    partial_ptr,  # [blocks, n] float32, in rows of `stride_partial`
    origin_ptr,  # [n] float32, updated where the row is computed again
    others_ptr,  # [n] float32, updated: Σ exp(z - origin·post) over the others so far
    e_ptr,  # [stored, width], rows computed again are written, or None
    anchors_ptr,  # [stored] float32, written: origin·post, or None
    total_ptr,  # [n, H] float32, in the same units as `others`, or None
    n,
    width,
    H,
    stored,
    first,
    blocks,
    stride_partial,
    stride_x,
    stride_w,
    stride_e,
    stride_total,
    scale,
    post,
    slope,
    SOFTCAP: tl.constexpr,
    FOLD_CAP: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, blocks, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < blocks)[:, None] & (m < n)[None, :]
        address = partial_ptr + p.to(tl.int64)[:, None] * stride_partial + m[None, :]
        total += tl.sum(tl.load(address, mask=mask, other=0.0), 0)
    origin = tl.load(origin_ptr + m, mask=m < n, other=0.0)
    others = tl.load(others_ptr + m, mask=m < n, other=0.0)

    again = total > LARGEST_SUM  # NaN stays: no origin mends it
    if tl.max(again.to(tl.int32), 0) != 0:
        column = _columns(labels_ptr, m, m < n, first, width)
        largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
        for v0 in range(0, width, BLOCK_V):
            acc = _products(
                x_ptr, w_ptr, m0, v0, n, width, H, stride_x, stride_w, EVEN_H, BLOCK_M, BLOCK_V,
                BLOCK_H,
            )  # fmt: skip
            v = v0 + tl.arange(0, BLOCK_V)
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + v, mask=v < width, other=0.0)[None, :]
            z = _u(acc, scale, SOFTCAP) * slope
            z = tl.where((v[None, :] == column[:, None]) | (v[None, :] >= width), LOWEST, z)
            largest = tl.maximum(largest, tl.max(z, 1))
        before = origin
        origin = tl.where(again, largest / slope, origin)
        total = tl.where(again, 0.0, total)
        for v0 in range(0, width, BLOCK_V):
            acc = _products(
                x_ptr, w_ptr, m0, v0, n, width, H, stride_x, stride_w, EVEN_H, BLOCK_M, BLOCK_V,
                BLOCK_H,
            )  # fmt: skip
            v = v0 + tl.arange(0, BLOCK_V)
            part, e = _epilogue(
                acc, v, origin, column, bias_ptr, width, scale, slope, SOFTCAP, FOLD_CAP
            )
            total += tl.where(again, part, 0.0)
            if e_ptr is not None:
                _store(e_ptr, e, m0, v0, again & (m < stored), width, stride_e)
        shrink = tl.where(again, tl.exp2((before - origin) * slope), 1.0)
        others *= shrink
        tl.store(origin_ptr + m, origin, mask=again & (m < n))
        if total_ptr is not None:
            for start in range(0, H, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                address = total_ptr + m.to(tl.int64)[:, None] * stride_total + h[None, :]
                mask = (again & (m < n))[:, None] & (h < H)[None, :]
                t = tl.load(address, mask=mask, other=0.0)
                tl.store(address, t * shrink[:, None], mask=mask)

    tl.store(others_ptr + m, others + total, mask=m < n)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + m, origin * post, mask=m < stored)


def anchored_fold(
    x: Tensor,  # [n, H]
    w: Tensor,  # [width, H]
    labels: Tensor,  # [n] int64
    bias: Tensor | None,  # [V] float32
    partial: Tensor,  # [blocks, n] float32
    origin: Tensor,  # [n] float32, updated
    others: Tensor,  # [n] float32, updated
    e: Tensor | None,  # [stored, width], rows computed again are written
    anchors: Tensor | None,  # [stored] float32, written
    total: Tensor | None,  # [n, H] float32, updated where rows are computed again
    first: int,
    *,
    scale: float,
    post: float,
    softcap: bool,
    fold_cap: bool,
) -> None:
    n, H = x.shape
    blocks = repair_blocks()
    with torch.cuda.device_of(x):
        anchored_fold_kernel[(triton.cdiv(n, blocks.m),)](
            x,
            w,
            labels,
            None if bias is None else bias[first:],
            partial,
            origin,
            others,
            e,
            anchors,
            total,
            n,
            len(w),
            H,
            0 if e is None else len(e),
            first,
            len(partial),
            partial.stride(0),
            x.stride(0),
            w.stride(0),
            0 if e is None else e.stride(0),
            0 if total is None else total.stride(0),
            scale,
            post,
            post * LOG2_E.value,
            SOFTCAP=softcap,
            FOLD_CAP=softcap and fold_cap,
            EVEN_H=H % blocks.h == 0,
            BLOCK_M=blocks.m,
            BLOCK_V=blocks.v,
            BLOCK_H=blocks.h,
            BLOCK_P=32,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            **FIXED_ROUNDING,
        )
