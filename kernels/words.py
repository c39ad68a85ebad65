"""Products of rows with a few words of their own, and sums of a few rows.

Products read n·K rows of the weight once; sums read each row as often as it is named, and write
their output once. A program owns its output, so that sums have one order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import PER_BATCH
from .rows import _check_unit_columns

_WORDS, _COLUMNS = 16, 256  # a tile of gathered rows: 16 KiB in float32


@triton.jit(**PER_BATCH)
def word_products_kernel(
    hidden_ptr,  # [n, h]
    weight_ptr,  # [words, h]
    ids_ptr,  # [n, k] int64
    out_ptr,  # [n, k] float32
    k,
    h,
    stride_hidden,
    stride_weight,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + n * k + j, mask=j < k, other=-1)
    there = ids >= 0
    rows = ids * stride_weight
    sums = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, h, BLOCK_H):
        c = start + tl.arange(0, BLOCK_H)
        x = tl.load(hidden_ptr + n * stride_hidden + c, mask=c < h, other=0.0).to(tl.float32)
        mask = there[:, None] & (c < h)[None, :]
        words = tl.load(weight_ptr + rows[:, None] + c[None, :], mask=mask, other=0.0)
        sums += tl.sum(words.to(tl.float32) * x[None, :], 1)
    # A row's NaN shall not reach cells without a word.
    tl.store(out_ptr + n * k + j, tl.where(there, sums, 0.0), mask=j < k)


@triton.jit
def word_sums_kernel(
    coefficients_ptr,  # [m] float32
    index_ptr,  # [m] int64
    offsets_ptr,  # [n + 1] int64
    rows_ptr,  # [any, h]
    out_ptr,  # [n, h]
    h,
    stride_rows,
    stride_out,
    BLOCK_J: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    begin, end = tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)
    sums = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(begin, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        index = tl.load(index_ptr + j, mask=j < end, other=-1)
        scale = tl.load(coefficients_ptr + j, mask=index >= 0, other=0.0)
        places = index[:, None] * stride_rows + c[None, :]
        mask = (index >= 0)[:, None] & (c < h)[None, :]
        rows = tl.load(rows_ptr + places, mask=mask, other=0.0).to(tl.float32)
        sums += tl.sum(rows * scale[:, None], 0)
    tl.store(out_ptr + n * stride_out + c, sums, mask=c < h)


def word_products(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    ids: Tensor,  # [n, K] int64, negative: no word
    out: Tensor,  # [n, K] float32, written
) -> None:
    n, k = ids.shape
    if ids.numel() == 0:
        return
    _check_unit_columns(hidden, weight)
    assert ids.is_contiguous() and out.is_contiguous(), (ids.stride(), out.stride())
    with torch.cuda.device_of(hidden):
        word_products_kernel[(n, triton.cdiv(k, _WORDS))](
            hidden,
            weight,
            ids,
            out,
            k,
            hidden.shape[1],
            hidden.stride(0),
            weight.stride(0),
            BLOCK_K=_WORDS,
            BLOCK_H=_COLUMNS,
        )


def word_sums(
    coefficients: Tensor,  # [M] float32
    index: Tensor,  # [M] int64, negative: left out
    offsets: Tensor,  # [n + 1] int64
    rows: Tensor,  # [R, H]
    out: Tensor,  # [n, H], written
) -> None:
    n, h = out.shape
    if out.numel() == 0:
        return
    _check_unit_columns(rows, out, coefficients, index, offsets)
    with torch.cuda.device_of(rows):
        word_sums_kernel[(n, triton.cdiv(h, _COLUMNS))](
            coefficients,
            index,
            offsets,
            rows,
            out,
            h,
            rows.stride(0),
            out.stride(0),
            BLOCK_J=_WORDS,
            BLOCK_H=_COLUMNS,
        )
