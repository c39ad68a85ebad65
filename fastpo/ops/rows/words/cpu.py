"""Kernels over a few words in csrc/cpu; rows/cpu.py chooses the instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu as rows_cpu
from ..native import DTYPES, check_matrix, compiled

_C, _MISSING = compiled()


def products(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    assert _C is not None, _MISSING
    n, k = ids.shape
    check_matrix(hidden, n, weight.shape[1], torch.float32)
    check_matrix(weight, *weight.shape)
    assert ids.dtype == torch.int64 and ids.is_contiguous()
    assert out.shape == ids.shape and out.dtype == torch.float32 and out.is_contiguous()
    work = _C.WordProducts(
        hidden=hidden.data_ptr(),
        hidden_stride=hidden.stride(0),
        weight=weight.data_ptr(),
        weight_dtype=DTYPES[weight.dtype],
        weight_stride=weight.stride(0),
        ids=ids.data_ptr(),
        n=n,
        v=k,
        h=weight.shape[1],
        out=out.data_ptr(),
    )
    _C.word_products_cpu(work, torch.get_num_threads(), rows_cpu.ISA)


def sums(coefficients: Tensor, index: Tensor, offsets: Tensor, rows: Tensor, out: Tensor) -> None:
    assert _C is not None, _MISSING
    n = len(offsets) - 1
    check_matrix(rows, *rows.shape)
    check_matrix(out, n, rows.shape[1])
    assert coefficients.dtype == torch.float32 and coefficients.is_contiguous()
    for x in (index, offsets):
        assert x.dtype == torch.int64 and x.is_contiguous()
    assert index.shape == coefficients.shape
    work = _C.WordSums(
        coefficients=coefficients.data_ptr(),
        index=index.data_ptr(),
        offsets=offsets.data_ptr(),
        rows=rows.data_ptr(),
        rows_dtype=DTYPES[rows.dtype],
        rows_stride=rows.stride(0),
        n=n,
        v=rows.shape[1],
        out=out.data_ptr(),
        out_dtype=DTYPES[out.dtype],
        out_stride=out.stride(0),
    )
    _C.word_sums_cpu(work, torch.get_num_threads(), rows_cpu.ISA)
