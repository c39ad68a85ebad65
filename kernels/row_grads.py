"""What the backward's row kernel asks of each row, from d loss / d results, in one launch.

Reads up to eight numbers a row and writes five. In float64, so that each is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import PER_BATCH
from .rows import COMMON, ENTROPY, FIXED_ROUNDING, LABEL, LOG_FLOOR, LOG_MASS, SHIFT

_ROWS = 128  # of one program


@triton.jit
def _expm1(x):
    """Of x <= 0 in float64: what exp x is rounded by is divided out again."""
    u = tl.exp(x)
    d = u - 1.0
    safe = (d < 0.0) & (d > -1.0)
    return tl.where(safe, d * (x / tl.log(tl.where(safe, u, 0.5))), tl.where(d == 0.0, x, d))


@triton.jit
def _optional(x_ptr, n, mask):
    x = n * 0.0
    if x_ptr is not None:
        x = tl.load(x_ptr + n, mask=mask, other=0.0)
    return x.to(tl.float64)


@triton.jit(**PER_BATCH)
def row_grads_kernel(
    logps_ptr,  # [n] float32, as all below
    maximum_ptr,
    log_mass_ptr,
    target_ptr,
    entropy_ptr,  # or None
    g_logps_ptr,  # d loss / d results, each or None
    g_entropy_ptr,
    g_lse_ptr,
    ignored_ptr,  # [n] uint8, or None: rows without gradient
    inverse_ptr,  # [n] float64, or None
    grads_ptr,  # [5, n], written
    count,
    stride_grads,
    cap,
    factor,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < count
    logps = tl.load(logps_ptr + n, mask=mask, other=0.0).to(tl.float64)
    shift = tl.load(maximum_ptr + n, mask=mask, other=0.0)
    log_mass = tl.load(log_mass_ptr + n, mask=mask, other=0.0)
    entropy = _optional(entropy_ptr, n, mask)
    g = _optional(g_logps_ptr, n, mask)
    g_entropy = _optional(g_entropy_ptr, n, mask)
    g_lse = _optional(g_lse_ptr, n, mask)
    # d loss / d z_v = p_v·(common - g_entropy·log p_v), and at the label + g
    common = g_lse - g - g_entropy * entropy
    # 0·(-inf) for a label whose bias is -inf would be NaN.
    log_p = tl.maximum(logps, LOG_FLOOR)
    at_label = -g * _expm1(logps) + tl.exp(logps) * (g_lse - g_entropy * (log_p + entropy))
    inverse = n * 0.0 + 1.0
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + n, mask=mask, other=1.0)
    if SOFTCAP:
        share = tl.load(target_ptr + n, mask=mask, other=0.0).to(tl.float64) / (cap * inverse)
        at_label *= 1.0 - share * share
    at_label *= factor * inverse
    if ignored_ptr is not None:
        # exp(z - inf) = 0 and zero coefficients: nothing of the row is left.
        ignored = tl.load(ignored_ptr + n, mask=mask, other=0) != 0
        shift = tl.where(ignored, 0.0, shift)
        log_mass = tl.where(ignored, float("inf"), log_mass)
        common = tl.where(ignored, 0.0, common)
        g_entropy = tl.where(ignored, 0.0, g_entropy)
        at_label = tl.where(ignored, 0.0, at_label)
    grads_ptr += n
    tl.store(grads_ptr + SHIFT * stride_grads, shift, mask=mask)
    tl.store(grads_ptr + LOG_MASS * stride_grads, log_mass, mask=mask)
    tl.store(grads_ptr + COMMON * stride_grads, common.to(tl.float32), mask=mask)
    tl.store(grads_ptr + ENTROPY * stride_grads, g_entropy.to(tl.float32), mask=mask)
    tl.store(grads_ptr + LABEL * stride_grads, at_label.to(tl.float32), mask=mask)


def row_grads(
    saved: tuple[Tensor | None, ...],  # logps, maximum, log_mass, target, and entropy or None: [n]
    upstream: tuple[Tensor | None, ...],  # d loss / d logps, entropy and lse: [n] float32
    ignored: Tensor | None,  # [n] bool
    grads: Tensor,  # [5, n] float32, written
    *,
    inverse: Tensor | None,  # [n] float64
    softcap: bool,
    cap: float,  # in units of z, but for `inverse`
    factor: float,  # dz/dx without the soft-cap and `inverse`
) -> None:
    n = grads.shape[1]
    if n == 0:
        return
    for x in (*saved, *upstream, inverse):
        assert x is None or (x.shape == (n,) and x.is_contiguous()), (x.shape, x.stride())
    with torch.cuda.device_of(grads):
        row_grads_kernel[(triton.cdiv(n, _ROWS),)](
            *saved,
            *upstream,
            None if ignored is None else ignored.view(torch.uint8),
            inverse,
            grads,
            n,
            grads.stride(0),
            cap,
            factor,
            SOFTCAP=softcap,
            BLOCK_N=_ROWS,
            num_warps=4,
            **FIXED_ROUNDING,
        )
