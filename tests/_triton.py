"""Where Triton's kernels run in tests: on a GPU, without one in its interpreter."""

from __future__ import annotations

import pytest
import torch

from fastpo.ops.rows import triton as rows_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_missing = rows_triton.unavailable(torch.device(DEVICE))
MARKS = [
    pytest.mark.skipif(_missing is not None, reason=str(_missing)),
    # The interpreter is numpy, which warns where a GPU makes its infinities in silence.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
