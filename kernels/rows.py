"""Row kernels over a float32 tile of raw products [n, v]: statistics, and d loss / d products.

Forward reads the tile once and folds it into 7 numbers a row; when exponentials are kept it reads
the tile a second time, from cache while the rows in flight fit there (25 MB on an H100 for 8,192
words), and writes n·v of their dtype. Backward reads n·v of its source and writes n·v of its
output; both may be one buffer.

All arithmetic is float32, in powers of two where tl.exp would do: the interpreter then runs what
the GPU runs (there tl.exp is ex2.approx of a product). Nothing is called from tl.extra.libdevice,
which the interpreter lacks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import PER_BATCH, row_blocks

# The rows of `state` and `grads`; fastpo/ops/rows/backend.py says what they mean.
MAX = tl.constexpr(0)
OTHERS = tl.constexpr(1)
TARGET = tl.constexpr(2)
MOMENT = tl.constexpr(3)
SQUARES = tl.constexpr(4)
SUM = tl.constexpr(5)
BEFORE = tl.constexpr(6)

SHIFT = tl.constexpr(0)
LOG_MASS = tl.constexpr(1)
COMMON = tl.constexpr(2)
ENTROPY = tl.constexpr(3)
LABEL = tl.constexpr(4)

LOG_FLOOR = tl.constexpr(-200.0)
# What stands in for a maximum of -inf: z - LOWEST is -inf there, where -inf - -inf is NaN.
LOWEST = tl.constexpr(-3.0e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# A product and a sum that the compiler fuses in one variant of a kernel and not in another would
# change bits between modes, and cost a label the equality with its row's maximum.
FIXED_ROUNDING = {"enable_fp_fusion": False}


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def _exp_of_row(x):
    """exp of a scalar that multiplies a whole row; _exp loses |x|·2**-24, this does not."""
    x = _max(x, LOG_FLOOR)
    n = tl.floor(x * LOG2_E + 0.5)
    # ln 2 in two pieces, the first of 9 bits: n times it is exact.
    f = (x - n * 0.693359375) + n * 0.00021219444005469057
    return tl.exp2(n) * _exp(f)


@triton.jit
def _max(a, b):
    """NaN stays: plain tl.maximum is max.f32, which returns the other operand."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh_near_0(x):
    """tanh x = x + x³·P(x²), P fitted on |x| < 1; of a larger x anything."""
    square = x * x
    p = tl.fma(square, -0.00035845146956910157, 0.0023013628522141547)
    p = tl.fma(square, p, -0.007946104205034617)
    p = tl.fma(square, p, 0.021486656175066725)
    p = tl.fma(square, p, -0.05387980226876057)
    p = tl.fma(square, p, 0.13332344566521953)
    p = tl.fma(square, p, -0.3333329543158415)
    return tl.fma(x * square, p, x)


@triton.jit
def _tanh(x):
    """Relative error at most 1e-7 in the interpreter; ±inf gives ±1, NaN stays."""
    # 1 - 2/(exp(2|x|) + 1) cancels towards 0.
    near = _tanh_near_0(x)
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 1.0, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _logits(row_ptr, bias_ptr, v, mask, scale, SOFTCAP: tl.constexpr):
    """u with z = u·post: x itself, or tanh(scale·x) whose slope is 1 - u²."""
    u = tl.load(row_ptr + v, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + v, mask=mask, other=0.0)
    if SOFTCAP:
        u = _tanh(u * scale)
    return u


@triton.jit
def _tempered(number, inverse_ptr, n):
    """Over the row's own temperature, where rows have one."""
    if inverse_ptr is not None:
        number = (number * tl.load(inverse_ptr + n)).to(tl.float32)
    return number


@triton.jit
def _column(labels_ptr, n, first, width):
    """Column of the row's label, clamped to [-1, width] before it becomes int32.

    A label of 2**32 + 3 is not word 3.
    """
    column = tl.load(labels_ptr + n) - first
    return tl.minimum(tl.maximum(column, -1), width).to(tl.int32)


@triton.jit(**PER_BATCH)
def rows_fwd_kernel(
    tile_ptr,  # [n, width] float32
    labels_ptr,  # [n] int64
    bias_ptr,  # [width] float32, from the tile's first word on, or None
    state_ptr,  # [7, n] float32
    kept_ptr,  # [n, width], or None; may be the tile
    anchors_ptr,  # [n] float32, or None
    width,
    first,
    stride_tile,
    stride_state,
    stride_kept,
    scale,
    post,
    headroom,
    inverse_ptr,  # [n] float64, or None
    WITH_MOMENT: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_SUM: tl.constexpr,
    WITH_BEFORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64: n * stride_tile passes 2**31 already at N = 16k, V = 128k
    n = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + n * stride_tile
    state_ptr += n
    post = _tempered(post, inverse_ptr, n)
    m = tl.load(state_ptr + MAX * stride_state)
    others = tl.load(state_ptr + OTHERS * stride_state)
    if WITH_MOMENT:
        moment = tl.load(state_ptr + MOMENT * stride_state)
    if WITH_SQUARES:
        squares = tl.load(state_ptr + SQUARES * stride_state)
    if WITH_SUM:
        total = tl.load(state_ptr + SUM * stride_state)
    if WITH_BEFORE:
        before = tl.load(state_ptr + BEFORE * stride_state)

    column = _column(labels_ptr, n, first, width)
    inside = (column >= 0) & (column < width)
    target = _logits(row_ptr, bias_ptr, column, inside, scale, SOFTCAP) * post
    tl.store(state_ptr + TARGET * stride_state, target, mask=inside)
    # The others' sum shows a NaN of any other word, the maximum has to show the label's.
    m = tl.where(inside & (target != target), target, m)

    for start in range(0, width, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = _logits(row_ptr, bias_ptr, v, v < width, scale, SOFTCAP) * post
        z = tl.where(v < width, z, -float("inf"))  # after the map: logit_scale may be negative
        m_before = m
        m = _max(m, tl.max(z, 0))
        origin = _max(m, LOWEST)
        gap = z - origin
        shift = m_before - origin
        e = tl.where(v == column, 0.0, _exp(gap))
        shrink = _exp_of_row(shift)
        if WITH_MOMENT:
            # The floor keeps 0·(-inf) out: exp(-200) is 0.
            moment = shrink * (moment + tl.maximum(shift, LOG_FLOOR) * others)
            moment += tl.sum(e * tl.maximum(gap, LOG_FLOOR), 0)
        if WITH_SQUARES:
            squares = shrink * shrink * squares + tl.sum(e * e, 0)
        if WITH_SUM:
            total += tl.sum(tl.where(v < width, z, 0.0), 0)
        if WITH_BEFORE:
            before = tl.maximum(before, tl.max(tl.where(v < column, z, -float("inf")), 0))
        others = shrink * others + tl.sum(e, 0)

    m = tl.where(others == others, m, others)
    tl.store(state_ptr + MAX * stride_state, m)
    tl.store(state_ptr + OTHERS * stride_state, others)
    if WITH_MOMENT:
        tl.store(state_ptr + MOMENT * stride_state, moment)
    if WITH_SQUARES:
        tl.store(state_ptr + SQUARES * stride_state, squares)
    if WITH_SUM:
        tl.store(state_ptr + SUM * stride_state, total)
    if WITH_BEFORE:
        tl.store(state_ptr + BEFORE * stride_state, before)

    # A second loop, of another shape: shared registers or shapes would let the layout of these
    # stores reorder the sums above, and a kept row would differ in bits from a scored one (seen).
    if kept_ptr is not None:
        anchor = _max(m, LOWEST) - headroom
        tl.store(anchors_ptr + n, anchor)
        kept_ptr += n * stride_kept
        for start in range(0, width, BLOCK_V // 2):
            v = start + tl.arange(0, BLOCK_V // 2)
            u = _logits(row_ptr, bias_ptr, v, v < width, scale, SOFTCAP)
            e = tl.where(v == column, 0.0, _exp(u * post - anchor))
            if FOLD_CAP:
                e *= tl.fma(-u, u, 1.0)
            tl.store(kept_ptr + v, e, mask=v < width)


@triton.jit(**PER_BATCH)
def rows_bwd_kernel(
    source_ptr,  # [n, width] float32 raw products, or kept exponentials when anchors are given
    anchors_ptr,  # [n] float32, or None
    labels_ptr,  # [n] int64
    bias_ptr,  # [width] float32, from the tile's first word on, or None
    grads_ptr,  # [5, n] float32
    out_ptr,  # [n, width]; may be the source
    width,
    first,
    stride_source,
    stride_grads,
    stride_out,
    scale,
    post,
    factor,
    inverse_ptr,  # [n] float64, or None
    SOFTCAP: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ptr = source_ptr + n * stride_source
    grads_ptr += n
    post = _tempered(post, inverse_ptr, n)
    factor = _tempered(factor, inverse_ptr, n)
    shift = tl.load(grads_ptr + SHIFT * stride_grads)
    log_mass = tl.load(grads_ptr + LOG_MASS * stride_grads)
    common = tl.load(grads_ptr + COMMON * stride_grads) * factor
    at_label = tl.load(grads_ptr + LABEL * stride_grads)
    column = _column(labels_ptr, n, first, width)

    if anchors_ptr is None:
        u = _logits(row_ptr, bias_ptr, v, v < width, scale, SOFTCAP)
        log_p = (u * post - shift) - log_mass
        p = _exp(log_p)
    else:
        anchor = tl.load(anchors_ptr + n)
        e = tl.load(row_ptr + v, mask=v < width, other=0.0).to(tl.float32)
        log_scale = (anchor - shift) - log_mass
        p = e * _exp_of_row(log_scale)
        log_e = tl.log2(e) * LN_2
        log_p = log_e + log_scale
        # A cell whose exponential underflowed has z = -inf here and p = 0.
        u = tl.maximum((log_e + anchor) * (1.0 / post), -1.0)

    # d loss / d z_v = p_v·(common - g_entropy·log p_v)
    dx = p * common
    if ENTROPY_GRAD:
        g_entropy = tl.load(grads_ptr + ENTROPY * stride_grads) * factor
        dx -= p * tl.maximum(log_p, LOG_FLOOR) * g_entropy
    if SOFTCAP:
        dx *= tl.fma(-u, u, 1.0)
    dx = tl.where(v == column, at_label, dx)
    tl.store(out_ptr + n * stride_out + v, dx, mask=v < width)


def rows_fwd(
    tile: Tensor,  # [n, v] float32
    first: int,
    labels: Tensor,  # [n] int64
    bias: Tensor | None,  # [V] float32
    state: Tensor,  # [7, n] float32, updated
    kept: Tensor | None,  # [n, v] float32/bf16/fp16, written; may be `tile`
    anchors: Tensor | None,  # [n] float32, written
    *,
    scale: float,  # inside the soft-cap's tanh
    post: float,  # z = post·x, or post·tanh(scale·x)
    inverse: Tensor | None,  # [n] float64, multiplies z of each row
    softcap: bool,
    stats: int,  # bits, see rows_fwd_kernel's WITH_ flags in their order
    headroom: float,
    fold_cap: bool,
) -> None:
    n, width = tile.shape
    if n == 0:
        return
    _check_unit_columns(tile, labels, bias, state, kept, anchors, inverse)
    blocks = row_blocks(width)
    with torch.cuda.device_of(tile):
        rows_fwd_kernel[(n,)](
            tile,
            labels,
            None if bias is None else bias[first:],
            state,
            kept,
            anchors,
            width,
            first,
            tile.stride(0),
            state.stride(0),
            0 if kept is None else kept.stride(0),
            scale,
            post,
            headroom,
            inverse,
            WITH_MOMENT=bool(stats & 1),
            WITH_SQUARES=bool(stats & 2),
            WITH_SUM=bool(stats & 4),
            WITH_BEFORE=bool(stats & 8),
            SOFTCAP=softcap,
            FOLD_CAP=softcap and fold_cap,
            BLOCK_V=blocks.v,
            num_warps=blocks.num_warps,
            **FIXED_ROUNDING,
        )


def rows_bwd(
    source: Tensor,  # [n, v] float32 raw products, or kept exponentials when anchors are given
    anchors: Tensor | None,  # [n] float32
    first: int,
    labels: Tensor,  # [n] int64
    bias: Tensor | None,  # [V] float32
    grads: Tensor,  # [5, n] float32
    out: Tensor,  # [n, v], written; may be `source`
    *,
    scale: float,
    post: float,
    inverse: Tensor | None,  # [n] float64
    factor: float,  # dz/dx without the soft-cap and `inverse`
    softcap: bool,
    entropy_grad: bool,
) -> None:
    n, width = source.shape
    if n == 0:
        return
    _check_unit_columns(source, anchors, labels, bias, grads, out, inverse)
    blocks = row_blocks(width)
    with torch.cuda.device_of(source):
        rows_bwd_kernel[(n, triton.cdiv(width, blocks.v))](
            source,
            anchors,
            labels,
            None if bias is None or anchors is not None else bias[first:],
            grads,
            out,
            width,
            first,
            source.stride(0),
            grads.stride(0),
            out.stride(0),
            scale,
            post,
            factor,
            inverse,
            SOFTCAP=softcap,
            ENTROPY_GRAD=entropy_grad,
            BLOCK_V=blocks.v,
            num_warps=blocks.num_warps,
            **FIXED_ROUNDING,
        )


def _check_unit_columns(*tensors: Tensor | None) -> None:
    for x in tensors:
        assert x is None or x.stride(-1) == 1 or x.shape[-1] == 1, x.stride()
