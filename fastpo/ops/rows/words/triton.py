"""Kernels over a few words in Triton; rows/triton.py says where they run.

Triton is imported by the first call, so that fastpo imports on a machine without it.
"""

from __future__ import annotations

from torch import Tensor


def products(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    from ....kernels.words import word_products

    word_products(hidden, weight, ids, out)


def sums(coefficients: Tensor, index: Tensor, offsets: Tensor, rows: Tensor, out: Tensor) -> None:
    from ....kernels.words import word_sums

    word_sums(coefficients, index, offsets, rows, out)
