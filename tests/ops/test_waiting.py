"""Nothing that a primitive does in any of its ways waits for a GPU."""

from __future__ import annotations

import pytest
import torch
from _primitives import CALLS

# The group of a head in shards is one of CPUs here.
CASES = [case for case, call in CALLS.items() if not call.name.startswith("vocab_parallel")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_waits_for_no_device_value(case):
    call = CALLS[case]
    if case == "logps of tiles" and torch.cuda.get_device_name() == "a pretended GPU":
        pytest.skip("the weight of a tile source has a device that is not pretended")
    call.gradients(call.leaves("cuda"))  # compile outside the guard
    leaves = call.leaves("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.gradients(leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
