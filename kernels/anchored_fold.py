"""Partial sums of anchored.py added up, and rows whose exponentials left float32's range redone.

Reads blocks·n partial sums per statistic and updates the row's state. A program that finds a row
out of range multiplies its block of rows with the tile's words again, twice: for the maximum, which
becomes the row's origin, and for the exponentials beside it. The host neither knows nor waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import repair_blocks
from .anchored import SUMS, _added, _columns, _epilogue, _products, _store, _u
from .rows import (
    BEFORE,
    FIXED_ROUNDING,
    LN_2,
    LOG2_E,
    LOWEST,
    MOMENT,
    OTHERS,
    SQUARES,
    SUM,
)

# A sum above this is computed again: its square, which Σ e² may reach, and 2**27 times that still
# fit in float32.
LARGEST_SUM = tl.constexpr(2.0**50)


@triton.jit
def _partial_sums(
    partial_ptr,
    m,
    n,
    blocks,
    stride_sum,
    stride_partial,
    WANTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sums = ()
    for i in tl.static_range(SUMS):
        total = tl.zeros((BLOCK_M,), tl.float32)
        if (WANTED >> i) & 1:
            for start in range(0, blocks, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)
                mask = (p < blocks)[:, None] & (m < n)[None, :]
                address = p.to(tl.int64)[:, None] * stride_partial + m[None, :]
                part = tl.load(partial_ptr + i * stride_sum + address, mask=mask, other=0.0)
                total += tl.sum(part, 0)
        sums = sums + (total,)  # noqa: RUF005  # what Triton parses
    return sums


@triton.jit
def _rows_of(sums, rows):
    parts = ()
    for i in tl.static_range(SUMS):
        parts = parts + (tl.where(rows, sums[i], 0.0),)  # noqa: RUF005
    return parts


@triton.jit
def _update(state_ptr, sums, shift, m, mask, stride_state, post, WANTED: tl.constexpr):
    """The tile's sums join the state, which moves to an origin `shift` nats higher."""
    shrink = tl.exp2(-shift * LOG2_E)
    others = tl.load(state_ptr + OTHERS * stride_state + m, mask=mask, other=0.0)
    tl.store(state_ptr + OTHERS * stride_state + m, others * shrink + sums[0], mask=mask)
    if WANTED & 2:
        moment = tl.load(state_ptr + MOMENT * stride_state + m, mask=mask, other=0.0)
        moment = shrink * (moment - shift * others) + sums[1] * LN_2
        tl.store(state_ptr + MOMENT * stride_state + m, moment, mask=mask)
    if WANTED & 4:
        squares = tl.load(state_ptr + SQUARES * stride_state + m, mask=mask, other=0.0)
        squares = shrink * shrink * squares + sums[2]
        tl.store(state_ptr + SQUARES * stride_state + m, squares, mask=mask)
    if WANTED & 8:
        total = tl.load(state_ptr + SUM * stride_state + m, mask=mask, other=0.0)
        tl.store(state_ptr + SUM * stride_state + m, total + sums[3] * post, mask=mask)
    if WANTED & 16:
        # A row that moved has its maximum above its target, and that is enough.
        at = state_ptr + BEFORE * stride_state + m
        tl.store(at, float("inf"), mask=mask & (sums[4] > 0.0))


@triton.jit
def anchored_fold_kernel(
    x_ptr,  # [n, H]
    w_ptr,  # [width, H]
    labels_ptr,  # [n] int64
    bias_ptr,  # [width] float32, from the tile's first word on, or None
    partial_ptr,  # [sums, blocks, n] float32, rows `stride_partial` apart
    origin_ptr,  # [n] float32, updated where the row is computed again
    state_ptr,  # [7, n] float32, updated: beside origin·post in place of the maximum
    e_ptr,  # [stored, width], rows computed again are written, or None
    anchors_ptr,  # [stored] float32, written: origin·post, or None
    total_ptr,  # [n, H] float32, in the same units as OTHERS, or None
    n,
    width,
    H,
    stored,
    first,
    blocks,
    stride_sum,
    stride_partial,
    stride_state,
    stride_x,
    stride_w,
    stride_e,
    stride_total,
    scale,
    post,
    slope,
    WANTED: tl.constexpr,
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
    sums = _partial_sums(
        partial_ptr, m, n, blocks, stride_sum, stride_partial, WANTED, BLOCK_M, BLOCK_P
    )
    origin = tl.load(origin_ptr + m, mask=m < n, other=0.0)
    shift = tl.zeros((BLOCK_M,), tl.float32)

    again = sums[0] > LARGEST_SUM  # NaN stays: no origin mends it
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
        sums = _rows_of(sums, again == 0)
        for v0 in range(0, width, BLOCK_V):
            acc = _products(
                x_ptr, w_ptr, m0, v0, n, width, H, stride_x, stride_w, EVEN_H, BLOCK_M, BLOCK_V,
                BLOCK_H,
            )  # fmt: skip
            v = v0 + tl.arange(0, BLOCK_V)
            part, e = _epilogue(
                acc, v, origin, column, bias_ptr, width, scale, slope, WANTED, SOFTCAP, FOLD_CAP
            )
            sums = _added(sums, _rows_of(part, again))
            if e_ptr is not None:
                _store(e_ptr, e, m0, v0, again & (m < stored), width, stride_e)
        shift = (origin - before) * post
        tl.store(origin_ptr + m, origin, mask=again & (m < n))
        if total_ptr is not None:
            shrink = tl.exp2(-shift * LOG2_E)
            for start in range(0, H, BLOCK_H):
                h = start + tl.arange(0, BLOCK_H)
                address = total_ptr + m.to(tl.int64)[:, None] * stride_total + h[None, :]
                mask = (again & (m < n))[:, None] & (h < H)[None, :]
                t = tl.load(address, mask=mask, other=0.0)
                tl.store(address, t * shrink[:, None], mask=mask)

    _update(state_ptr, sums, shift, m, m < n, stride_state, post, WANTED)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + m, origin * post, mask=m < stored)


def anchored_fold(
    x: Tensor,  # [n, H]
    w: Tensor,  # [width, H]
    labels: Tensor,  # [n] int64
    bias: Tensor | None,  # [V] float32
    partial: Tensor,  # [SUMS, blocks, n] float32, or of the first sum alone
    origin: Tensor,  # [n] float32, updated
    state: Tensor,  # [7, n] float32, updated: see rows_fwd, with origin·post as MAX, not written
    e: Tensor | None,  # [stored, width], rows computed again are written
    anchors: Tensor | None,  # [stored] float32, written
    total: Tensor | None,  # [n, H] float32, updated where rows are computed again
    first: int,
    *,
    scale: float,
    post: float,
    softcap: bool,
    stats: int,
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
            state,
            e,
            anchors,
            total,
            n,
            len(w),
            H,
            0 if e is None else len(e),
            first,
            partial.shape[1],
            partial.stride(0),
            partial.stride(1),
            state.stride(0),
            x.stride(0),
            w.stride(0),
            0 if e is None else e.stride(0),
            0 if total is None else total.stride(0),
            scale,
            post,
            post * LOG2_E.value,
            WANTED=1 + 2 * stats,
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
