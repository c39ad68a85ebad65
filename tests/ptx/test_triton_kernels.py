"""The first minutes on a GPU, without one: Triton's kernels, compiled for it, against float64.

What is asked is benchmarks/gpu_smoke.py's, of small heads.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from _ask import invariant, kernels


@pytest.mark.parametrize(
    ("backend", "capability", "every", "expected"),
    [
        ("anchored", 90, 11, {"anchored_fwd_tma_kernel", "anchored_fwd_kernel"}),
        ("anchored", 80, 23, {"anchored_fwd_kernel", "anchored_fold_kernel"}),
        ("triton", 90, 13, {"rows_fwd_kernel", "rows_bwd_kernel", "finish_kernel"}),
    ],
)
def test_smoke(backend, capability, every, expected):
    assert kernels(backend, every, "--capability", capability) >= expected


def test_a_token_has_the_same_bits_in_batches_of_all_sizes():
    """The interpreter cannot tell: Triton lays a sum out by what it knows of the sizes."""
    assert invariant("anchored") == 2
