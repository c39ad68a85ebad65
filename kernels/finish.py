"""What a folded row says: log-probability and statistics from its state, in one launch.

Reads the state [7, n] and writes n numbers for each result. In float64, which for a few numbers a
row costs nothing, so that each is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import PER_BATCH
from .rows import BEFORE, FIXED_ROUNDING, LOG_FLOOR, MAX, MOMENT, OTHERS, SQUARES, TARGET

ALWAYS = ("logps", "lse", "target", "maximum", "log_mass")  # the results that are not asked for
_ROWS = 128  # of one program


@triton.jit
def _log1p(x):
    """Of x >= 0 in float64: what 1 + x is rounded by is divided out again."""
    u = 1.0 + x
    d = u - 1.0
    near = tl.log(u) * (x / tl.where(d == 0.0, 1.0, d))
    return tl.where(d == 0.0, x, tl.where(u == x, tl.log(u), near))


@triton.jit
def _store(results_ptr, n, x, mask, ignored):
    tl.store(results_ptr + n, tl.where(ignored, 0.0, x).to(tl.float32), mask=mask)


@triton.jit(**PER_BATCH)
def finish_kernel(
    state_ptr,  # [7, n] float32
    ignored_ptr,  # [n] uint8, or None
    logps_ptr,  # this and all below [n], written
    lse_ptr,
    target_ptr,
    maximum_ptr,
    log_mass_ptr,
    entropy_ptr,  # or None
    log_sum_sq_probs_ptr,  # or None
    is_top1_ptr,  # uint8, or None
    count,
    stride_state,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < count
    state_ptr += n
    ignored = n < 0
    if ignored_ptr is not None:
        ignored = tl.load(ignored_ptr + n, mask=mask, other=0) != 0
    m = tl.load(state_ptr + MAX * stride_state, mask=mask, other=0.0).to(tl.float64)
    others = tl.load(state_ptr + OTHERS * stride_state, mask=mask, other=1.0).to(tl.float64)
    target = tl.load(state_ptr + TARGET * stride_state, mask=mask, other=0.0).to(tl.float64)
    own = tl.exp(target - m)  # mass of the label beside the others', in units of exp(m)
    mass = others + own
    # -log(1 + mass of the others / mass of the label): no cancellation however peaked.
    gap = (m - target) + tl.log(others)
    logps = -(tl.maximum(gap, 0.0) + _log1p(tl.exp(-tl.abs(gap))))
    log_mass = tl.where(target == m, _log1p(others), tl.log(mass))
    _store(logps_ptr, n, logps, mask, ignored)
    _store(lse_ptr, n, m + log_mass, mask, ignored)
    _store(target_ptr, n, target, mask, ignored)
    _store(maximum_ptr, n, m, mask, ignored)
    _store(log_mass_ptr, n, log_mass, mask, ignored)
    if entropy_ptr is not None:
        moment = tl.load(state_ptr + MOMENT * stride_state, mask=mask, other=0.0).to(tl.float64)
        moment += own * tl.maximum(target - m, LOG_FLOOR)
        entropy = log_mass - moment / mass
        _store(entropy_ptr, n, tl.where(entropy < 0.0, 0.0, entropy), mask, ignored)
    if log_sum_sq_probs_ptr is not None:
        squares = tl.load(state_ptr + SQUARES * stride_state, mask=mask, other=1.0).to(tl.float64)
        squares += own * own
        _store(log_sum_sq_probs_ptr, n, tl.log(squares) - 2.0 * log_mass, mask, ignored)
    if is_top1_ptr is not None:
        before = tl.load(state_ptr + BEFORE * stride_state, mask=mask, other=0.0).to(tl.float64)
        best = (target >= m) & (target > before) & (ignored == 0)
        tl.store(is_top1_ptr + n, best.to(tl.uint8), mask=mask)


def finish(
    state: Tensor,  # [7, n] float32
    ignored: Tensor | None,  # [n] bool: rows whose results are 0
    results: dict[str, Tensor],  # [n], written: ALWAYS, and others by name
) -> None:
    n = state.shape[1]
    if n == 0:
        return
    assert state.stride(1) == 1 or n == 1, state.stride()
    best = results.get("is_top1")
    with torch.cuda.device_of(state):
        finish_kernel[(triton.cdiv(n, _ROWS),)](
            state,
            None if ignored is None else ignored.view(torch.uint8),
            *(results[name] for name in ALWAYS),
            results.get("entropy"),
            results.get("log_sum_sq_probs"),
            None if best is None else best.view(torch.uint8),
            n,
            state.stride(0),
            BLOCK_N=_ROWS,
            num_warps=4,
            **FIXED_ROUNDING,
        )
