"""Kernels over a few words of each row, [n, K] of the vocabulary's V.

Where a row needs 20 of 150,000 words, its products are 20 dot products. Both kernels sum in float32
and in an order that depends on nothing but the row, without atomics.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class WordKernels(Protocol):
    """A backend module offers these two functions."""

    def products(
        self,
        hidden: Tensor,  # [n, H] float32, or of the weight's dtype
        weight: Tensor,  # [V, H]
        ids: Tensor,  # [n, K] int64 in [0, V), or negative: no word
        out: Tensor,  # [n, K] float32, written: <hidden_i, weight[ids_ij]>, 0 where there is none
    ) -> None: ...

    def sums(
        self,
        coefficients: Tensor,  # [M] float32
        index: Tensor,  # [M] int64 in [0, R), or negative: left out
        offsets: Tensor,  # [n + 1] int64, rising, in [0, M]
        rows: Tensor,  # [R, H]
        out: Tensor,  # [n, H], written, rounded once
    ) -> None:
        """out_i = Σ_j coefficients_j·rows[index_j], j in [offsets_i, offsets_{i+1})."""
