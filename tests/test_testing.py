"""The rule by which everything else is judged."""

import pytest
import torch

from fastpo.testing import assert_as_good_as_eager

TRUTH = torch.tensor([1.0, 2.0, float("inf"), float("nan")], dtype=torch.float64)
INF, NAN = float("inf"), float("nan")


def check(fused, eager):
    values = [torch.tensor(x, dtype=torch.float32) for x in (fused, eager)]
    assert_as_good_as_eager("x", *values, TRUTH)


@pytest.mark.parametrize(
    ("fused", "eager"),
    [
        ([1.0, 2.0, INF, NAN], [1.0, 2.0, INF, NAN]),
        ([1.0, 2.2, INF, NAN], [1.1, 2.0, INF, NAN]),  # twice as far
        ([INF, 2.0, INF, NAN], [INF, 2.0, INF, NAN]),  # both have left the dtype's range
        ([1.0, NAN, INF, NAN], [1.0, NAN, INF, NAN]),
        ([1.0, 2.0, INF, NAN], [NAN, INF, INF, NAN]),
    ],
)
def test_as_good(fused, eager):
    check(fused, eager)


@pytest.mark.parametrize(
    ("fused", "eager"),
    [
        ([1.0, 2.3, INF, NAN], [1.1, 2.0, INF, NAN]),
        ([9.0, 2.0, INF, NAN], [INF, 2.0, INF, NAN]),
        ([1.0, 5.0, INF, NAN], [NAN, 2.0, INF, NAN]),
        ([-INF, 2.0, INF, NAN], [INF, 2.0, INF, NAN]),
        ([NAN, 2.0, INF, NAN], [1.0, 2.0, INF, NAN]),
        ([1.0, 2.0, 3.0, NAN], [1.0, 2.0, INF, NAN]),
        ([1.0, 2.0, 3.0, NAN], [1.0, 2.0, 4.0, NAN]),
        ([1.0, 2.0, INF, 0.0], [1.0, 2.0, INF, NAN]),
    ],
)
def test_worse(fused, eager):
    with pytest.raises(AssertionError, match="x: error "):
        check(fused, eager)
