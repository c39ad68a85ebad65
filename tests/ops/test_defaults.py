"""PyTorch's default dtype and default device are the caller's: no primitive has a part of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from _primitives import BACKENDS, CALLS

# Its rows are those of "triton" but for the forward of `linear_logps`.
CASES = [
    (case, backend)
    for case, backend in itertools.product(CALLS, BACKENDS)
    if backend != "anchored" or CALLS[case].name == "linear_logps"
]


@pytest.mark.parametrize(("case", "backend"), CASES)
def test_the_same_bits_under_any_default(case, backend, defaults, mesh):
    call = CALLS[case]
    plain = call.gradients(call.leaves(), backend=backend)
    for dtype in (torch.bfloat16, torch.float64):
        leaves = call.leaves()
        defaults(dtype)
        found = call.gradients(leaves, backend=backend)
        defaults()
        assert len(found) == len(plain)
        for x, expected in zip(found, plain, strict=True):
            assert x.dtype == expected.dtype and x.device == expected.device, dtype
            assert torch.equal(x, expected), dtype
