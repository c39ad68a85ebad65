"""CUDA C++ and CUTLASS without a GPU: the PTX that nvcc makes of them, in `make cuda`."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest
from _ask import invariant, kernels, printed

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from _nvcc import NVCC, extension, has_cutlass

pytestmark = pytest.mark.skipif(
    NVCC is None or not has_cutlass(), reason="no nvcc or no CUTLASS; `make cuda` brings them"
)


def test_rows():
    names = kernels("cuda", 19, "--extension", extension())
    assert all(any(part in x for x in names) for part in ("forward_kernel", "backward_kernel"))


def test_smoke_of_cutlass():
    names = kernels("cutlass", 23, "--extension", extension())
    assert any("WarpSpecializedPingpong" in x for x in names)


def test_every_product_on_cutlass():
    """Right; and a row's sum the same bits whatever else is asked, and wherever it stands."""
    digests = defaultdict(set)
    for row in printed("_cutlass_cases.py", extension()):
        sums, stored = row["errors"][: row["sums"]], row["errors"][row["sums"] :]
        assert max(sums) < 2e-6 and max(stored, default=0) < 2.0**-8, row
        if row["digest"]:
            digests[row["pingpong"], row["bias"]].add(row["digest"])
    assert len(digests) == 4 and all(len(found) == 1 for found in digests.values())


def test_a_token_has_the_same_bits_in_batches_of_all_sizes():
    assert invariant("cutlass", FASTPO_EXTENSION=extension()) == 2
