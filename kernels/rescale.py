"""Sums of rows brought into new units, where these changed.

A row's maximum rises in few of its tiles: in the k-th of equal ones with probability 1/k where
words have no order. Rows whose maximum stayed are neither read nor written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import PER_BATCH
from .rows import FIXED_ROUNDING, _check_unit_columns, _exp_of_row

_COLUMNS = 1024


@triton.jit(**PER_BATCH)
def rescale_kernel(
    total_ptr,  # [n, h] float32
    before_ptr,  # [n] float32
    anchors_ptr,  # [n] float32
    h,
    stride_total,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    before, anchor = tl.load(before_ptr + n), tl.load(anchors_ptr + n)
    if before != anchor:  # true of NaN, which has to reach the row
        factor = _exp_of_row(before - anchor)
        total_ptr += n * stride_total
        for start in range(0, h, BLOCK_H):
            c = start + tl.arange(0, BLOCK_H)
            x = tl.load(total_ptr + c, mask=c < h, other=0.0)
            tl.store(total_ptr + c, x * factor, mask=c < h)


def rescale(
    total: Tensor,  # [n, h] float32, updated
    before: Tensor,  # [n] float32
    anchors: Tensor,  # [n] float32
) -> None:
    """Each row of `total` times exp(before - anchors)."""
    n, h = total.shape
    if n == 0:
        return
    _check_unit_columns(total, before, anchors)
    block = min(triton.next_power_of_2(h), _COLUMNS)
    with torch.cuda.device_of(total):
        rescale_kernel[(n,)](
            total, before, anchors, h, total.stride(0), BLOCK_H=block,
            num_warps=max(block // 256, 1), **FIXED_ROUNDING,
        )  # fmt: skip
