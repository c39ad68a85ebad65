"""The label's cell of exponentials that were computed again, where it is among a tile's words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import ROW_NUMBERS
from .rows import FIXED_ROUNDING, _check_unit_columns

_ROWS = 128


@triton.jit(do_not_specialize=("n", "words", "first"), do_not_specialize_on_alignment=ROW_NUMBERS)
def anchored_label_kernel(
    e_ptr,  # [n, words]
    own_ptr,  # [n]
    labels_ptr,  # [n] int64
    n,
    words,
    first,
    stride_e,
    BLOCK_M: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.load(labels_ptr + m, mask=m < n, other=-1) - first
    here = (column >= 0) & (column < words)
    own = tl.load(own_ptr + m, mask=here, other=0.0)
    tl.store(e_ptr + m * stride_e + column, own, mask=here)


def anchored_label(
    e: Tensor,  # [n, words], one cell of a row is written at most
    own: Tensor,  # [n] in e's dtype
    labels: Tensor,  # [n] int64
    first: int,  # word of e's first column
) -> None:
    n, words = e.shape
    _check_unit_columns(e, own, labels)
    with torch.cuda.device_of(e):
        anchored_label_kernel[(triton.cdiv(n, _ROWS),)](
            e, own, labels, n, words, first, e.stride(0), BLOCK_M=_ROWS, num_warps=4,
            **FIXED_ROUNDING,
        )  # fmt: skip
