"""Row kernels over two float32 tiles [n, v], the student's and the teacher's.

Softmaxes and values read both tiles once, and fold them into 6 and 3 numbers a row; gradients read
both once and write n·v of each head that is trained. A row whose gradient is 0 is not read.

As in rows.py all arithmetic is float32, in powers of two. Only the sums of the values, which a
divergence takes as the small difference of large ones, grow in float64 from tile to tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import BATCH_SIZES
from .pair_operands import PairTerms, Sides, launch, operands, terms_of
from .rows import (
    LOG_FLOOR,
    _check_unit_columns,
    _exp,
    _exp_of_row,
    _logits,
    _max,
    _tanh_near_0,
    _tempered,
)
from .rows import LOWEST as ORIGIN

# The rows of `state`, `constants` and `factors`; see fastpo/ops/rows/pair/backend.py.
MAX = tl.constexpr(0)
MASS = tl.constexpr(1)
CROSS = tl.constexpr(4)
MOMENT = tl.constexpr(5)

SHIFT = tl.constexpr(0)
LOG_MASS = tl.constexpr(1)

TOTAL = tl.constexpr(0)
GRAD = tl.constexpr(2)

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
ALPHA = tl.constexpr(3)
TVD = tl.constexpr(4)

LARGEST = tl.constexpr(40.0)
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _z(row_ptr, bias_ptr, v, width, scale, post, SOFTCAP: tl.constexpr):
    z = _logits(row_ptr, bias_ptr, v, v < width, scale, SOFTCAP) * post
    return tl.where(v < width, z, -float("inf"))


@triton.jit
def _move(m_before, z):
    """The maximum with z in it, how far it moved and exp of that; z below it and exp of that."""
    m = _max(m_before, tl.max(z, 0))
    origin = _max(m, ORIGIN)
    shift = _max(m_before - origin, LOWEST)
    gap = _max(z - origin, LOWEST)
    return m, shift, _exp_of_row(shift), gap, _exp(gap)


@triton.jit(do_not_specialize=BATCH_SIZES)
def pair_softmaxes_kernel(
    s_ptr,  # [n, width] float32
    t_ptr,  # [n, width] float32
    s_bias_ptr,  # [width] float32, from the tiles' first word on, or None
    t_bias_ptr,
    s_inverse_ptr,  # [n] float64, or None
    t_inverse_ptr,
    state_ptr,  # [6, n] float32
    width,
    s_stride,
    t_stride,
    stride_state,
    s_scale,
    s_post,
    t_scale,
    t_post,
    OVER: tl.constexpr,  # 0, 1 or None
    WITH_MOMENT: tl.constexpr,
    S_SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # int64: n * stride passes 2**31 already at N = 16k, V = 128k
    n = tl.program_id(0).to(tl.int64)
    s_ptr += n * s_stride
    t_ptr += n * t_stride
    s_post, t_post = _tempered(s_post, s_inverse_ptr, n), _tempered(t_post, t_inverse_ptr, n)
    state_ptr += n
    m = tl.load(state_ptr + MAX * stride_state)
    mass = tl.load(state_ptr + MASS * stride_state)
    t_m = tl.load(state_ptr + (MAX + 2) * stride_state)
    t_mass = tl.load(state_ptr + (MASS + 2) * stride_state)
    if OVER is not None:
        cross = tl.load(state_ptr + CROSS * stride_state)
    if WITH_MOMENT:
        moment = tl.load(state_ptr + MOMENT * stride_state)

    for start in range(0, width, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = _z(s_ptr, s_bias_ptr, v, width, s_scale, s_post, S_SOFTCAP)
        m, shift, shrink, gap, e = _move(m, z)
        z = _z(t_ptr, t_bias_ptr, v, width, t_scale, t_post, T_SOFTCAP)
        t_m, t_shift, t_shrink, t_gap, t_e = _move(t_m, z)
        if OVER == 0:
            cross = shrink * (cross + (shift - t_shift) * mass)
            cross += tl.sum(e * (gap - t_gap), 0)
        if OVER == 1:
            cross = t_shrink * (cross + (t_shift - shift) * t_mass)
            cross += tl.sum(t_e * (t_gap - gap), 0)
        if WITH_MOMENT:
            moment = shrink * (moment + shift * mass) + tl.sum(e * gap, 0)
        mass = shrink * mass + tl.sum(e, 0)
        t_mass = t_shrink * t_mass + tl.sum(t_e, 0)

    # tl.max may pass over a NaN: the mass is NaN then, and with it all that is made of the row.
    tl.store(state_ptr + MAX * stride_state, m)
    tl.store(state_ptr + MASS * stride_state, mass)
    tl.store(state_ptr + (MAX + 2) * stride_state, t_m)
    tl.store(state_ptr + (MASS + 2) * stride_state, t_mass)
    if OVER is not None:
        tl.store(state_ptr + CROSS * stride_state, cross)
    if WITH_MOMENT:
        tl.store(state_ptr + MOMENT * stride_state, moment)


@triton.jit
def _constants(constants_ptr, stride):
    """SHIFT and LOG_MASS, of the student and of the teacher."""
    shift_ptr, log_mass_ptr = constants_ptr + SHIFT * stride, constants_ptr + LOG_MASS * stride
    s_shift, s_log_mass = tl.load(shift_ptr), tl.load(log_mass_ptr)
    return s_shift, s_log_mass, tl.load(shift_ptr + 2 * stride), tl.load(log_mass_ptr + 2 * stride)


@triton.jit
def _difference(a, b, x):
    """a - b where a = b·exp(2·x); subtracted, they would leave only rounding near x = 0."""
    return tl.where(tl.abs(x) < 1.0, (a + b) * _tanh_near_0(x), a - b)


@triton.jit
def _terms(s, t, p, q, s_weight, t_weight, scale, KIND: tl.constexpr):
    """f, ∂f/∂s and ∂f/∂t of log-probabilities s and t, exp(s) = p and exp(t) = q."""
    if KIND == FORWARD_KL:
        f = q * (t - s)
        ds, dt = -q, f + q
    elif KIND == REVERSE_KL:
        f = p * (s - t)
        ds, dt = f + p, -p
    elif KIND == JSD:
        p *= s_weight
        q *= t_weight
        # Where both are 0, 0·(l - floor) is 0.
        mixture = _max(tl.log(p + q), LOG_FLOOR)
        # What moves the mixture cancels between the two terms.
        ds, dt = p * (s - mixture), q * (t - mixture)
        f = ds + dt
    elif KIND == ALPHA:
        exponent = t_weight * t + s_weight * s
        e = _exp(tl.minimum(exponent, LARGEST, propagate_nan=tl.PropagateNan.ALL))
        gap = 0.5 * (t - s)
        # (p - e)/α and (q - e)/(1 - α)
        ds = _difference(e, p, t_weight * gap) * (s_weight * scale)
        dt = _difference(q, e, s_weight * gap) * (t_weight * -scale)
        f = ds + dt
    else:
        gap = p - q
        # 0·gap: 0 at equality, and NaN stays.
        sign = tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, 0.0 * gap))
        f = sign * gap
        ds, dt = sign * p, -sign * q
    return f, ds, dt


@triton.jit(do_not_specialize=BATCH_SIZES)
def pair_values_kernel(
    s_ptr,  # [n, width] float32
    t_ptr,  # [n, width] float32
    s_bias_ptr,  # [width] float32, from the tiles' first word on, or None
    t_bias_ptr,
    s_inverse_ptr,  # [n] float64, or None
    t_inverse_ptr,
    constants_ptr,  # [4, n] float32
    sums_ptr,  # [3, n] float64
    width,
    s_stride,
    t_stride,
    stride_constants,
    stride_sums,
    s_scale,
    s_post,
    t_scale,
    t_post,
    s_weight,
    t_weight,
    scale,
    KIND: tl.constexpr,
    S_SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    s_ptr += n * s_stride
    t_ptr += n * t_stride
    s_post, t_post = _tempered(s_post, s_inverse_ptr, n), _tempered(t_post, t_inverse_ptr, n)
    sums_ptr += n
    s_shift, s_log_mass, t_shift, t_log_mass = _constants(constants_ptr + n, stride_constants)
    # float32 within the tile; promoted where they join the float64 sums.
    f_sum, ds_sum, dt_sum = 0.0, 0.0, 0.0
    for start in range(0, width, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = _z(s_ptr, s_bias_ptr, v, width, s_scale, s_post, S_SOFTCAP)
        s = _max((z - s_shift) - s_log_mass, LOWEST)
        z = _z(t_ptr, t_bias_ptr, v, width, t_scale, t_post, T_SOFTCAP)
        t = _max((z - t_shift) - t_log_mass, LOWEST)
        f, ds, dt = _terms(s, t, _exp(s), _exp(t), s_weight, t_weight, scale, KIND)
        # Beyond the tile both are LOWEST, where every kind's terms are 0.
        f_sum += tl.sum(f, 0)
        ds_sum += tl.sum(ds, 0)
        dt_sum += tl.sum(dt, 0)
    tl.store(sums_ptr, tl.load(sums_ptr) + f_sum)
    sums_ptr += stride_sums
    tl.store(sums_ptr, tl.load(sums_ptr) + ds_sum)
    sums_ptr += stride_sums
    tl.store(sums_ptr, tl.load(sums_ptr) + dt_sum)


@triton.jit
def _dproducts(derivative, p, u, total_ptr, grad, factor, SOFTCAP: tl.constexpr):  # [BLOCK_V]
    # dD/dz_v = g_v - p_v·G
    dx = (derivative - p * tl.load(total_ptr)) * (grad * factor)
    if SOFTCAP:
        dx *= tl.fma(-u, u, 1.0)
    # Selected, because 0·NaN is NaN.
    return tl.where(grad == 0, 0.0, dx)


@triton.jit(do_not_specialize=BATCH_SIZES)
def pair_gradients_kernel(
    s_ptr,  # [n, width] float32
    t_ptr,  # [n, width] float32
    s_bias_ptr,  # [width] float32, from the tiles' first word on, or None
    t_bias_ptr,
    s_inverse_ptr,  # [n] float64, or None
    t_inverse_ptr,
    constants_ptr,  # [4, n] float32
    factors_ptr,  # [3, n] float32
    s_out_ptr,  # [n, width], or None
    t_out_ptr,  # [n, width], or None
    width,
    s_stride,
    t_stride,
    stride_constants,
    stride_factors,
    s_stride_out,
    t_stride_out,
    s_scale,
    s_post,
    s_factor,
    t_scale,
    t_post,
    t_factor,
    s_weight,
    t_weight,
    scale,
    KIND: tl.constexpr,
    S_SOFTCAP: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    factors_ptr += n
    s_shift, s_log_mass, t_shift, t_log_mass = _constants(constants_ptr + n, stride_constants)
    grad = tl.load(factors_ptr + GRAD * stride_factors)
    read = v < tl.where(grad == 0, 0, width)
    s_ptr += n * s_stride
    t_ptr += n * t_stride
    s_post, t_post = _tempered(s_post, s_inverse_ptr, n), _tempered(t_post, t_inverse_ptr, n)
    u = _logits(s_ptr, s_bias_ptr, v, read, s_scale, S_SOFTCAP)
    s = _max((u * s_post - s_shift) - s_log_mass, LOWEST)
    t_u = _logits(t_ptr, t_bias_ptr, v, read, t_scale, T_SOFTCAP)
    t = _max((t_u * t_post - t_shift) - t_log_mass, LOWEST)
    p, q = _exp(s), _exp(t)
    _, ds, dt = _terms(s, t, p, q, s_weight, t_weight, scale, KIND)
    total_ptr = factors_ptr + TOTAL * stride_factors
    if s_out_ptr is not None:
        s_factor = _tempered(s_factor, s_inverse_ptr, n)
        dx = _dproducts(ds, p, u, total_ptr, grad, s_factor, S_SOFTCAP)
        tl.store(s_out_ptr + n * s_stride_out + v, dx, mask=v < width)
    if t_out_ptr is not None:
        total_ptr += stride_factors
        t_factor = _tempered(t_factor, t_inverse_ptr, n)
        dx = _dproducts(dt, q, t_u, total_ptr, grad, t_factor, T_SOFTCAP)
        tl.store(t_out_ptr + n * t_stride_out + v, dx, mask=v < width)


def pair_softmaxes(
    sides: Sides,
    first: int,
    state: Tensor,  # [6, n] float32, updated
    *,
    over: int | None,
    entropy: bool,
) -> None:
    n, width = sides[0].tile.shape
    if n == 0:
        return
    _check_unit_columns(state)
    with torch.cuda.device_of(state):
        pair_softmaxes_kernel[(n,)](
            **operands(sides, first),
            state_ptr=state,
            stride_state=state.stride(0),
            OVER=over,
            WITH_MOMENT=entropy,
            **launch(width),
        )


def pair_values(
    sides: Sides,
    first: int,
    constants: Tensor,  # [4, n] float32
    sums: Tensor,  # [3, n] float64, added to
    terms: PairTerms,
) -> None:
    n, width = sides[0].tile.shape
    if n == 0:
        return
    _check_unit_columns(constants, sums)
    with torch.cuda.device_of(sums):
        pair_values_kernel[(n,)](
            **operands(sides, first),
            **terms_of(terms),
            constants_ptr=constants,
            stride_constants=constants.stride(0),
            sums_ptr=sums,
            stride_sums=sums.stride(0),
            **launch(width),
        )


def pair_gradients(
    sides: Sides,
    first: int,
    constants: Tensor,  # [4, n] float32
    factors: Tensor,  # [3, n] float32
    outs: tuple[Tensor | None, Tensor | None],  # [n, v], written
    terms: PairTerms,
) -> None:
    n, width = sides[0].tile.shape
    if n == 0:
        return
    _check_unit_columns(constants, factors, *outs)
    options = launch(width)
    written = {}
    for name, side, out in zip(("s", "t"), sides, outs, strict=True):
        written[f"{name}_out_ptr"] = out
        written[f"{name}_stride_out"] = 0 if out is None else out.stride(0)
        written[f"{name}_factor"] = side.factor
    with torch.cuda.device_of(factors):
        pair_gradients_kernel[(n, triton.cdiv(width, options["BLOCK_V"]))](
            **operands(sides, first),
            **terms_of(terms),
            **written,
            constants_ptr=constants,
            stride_constants=constants.stride(0),
            factors_ptr=factors,
            stride_factors=factors.stride(0),
            **options,
        )
