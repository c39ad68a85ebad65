"""Supports of no words, and parts of a `fastpo.Support`."""

from __future__ import annotations

import pytest
import torch

import fastpo


@pytest.mark.parametrize("shape", [(2, 3), (6,), (0, 3)])
def test_a_support_of_no_words_restricts_nobody(shape):
    labels = torch.zeros(shape, dtype=torch.int64)
    hidden, weight = torch.randn(*shape, 8), torch.randn(11, 8)
    nothing = torch.empty(*shape, 0, dtype=torch.int64)
    found = fastpo.linear_logps(hidden, weight, labels, support=nothing).logps
    torch.testing.assert_close(found, fastpo.linear_logps(hidden, weight, labels).logps)


def test_parts_of_a_support():
    support = fastpo.Support.of([[1, 2], [3], None])
    assert [len(part) for part in support.split([2, 1])] == [2, 1]
    for call, message in (
        (lambda: support.split([1, 1]), r"sizes: expected a sum of 3, got \[1, 1\]"),
        (lambda: support.split([4, -1]), r"sizes: expected a sum of 3, got \[4, -1\]"),
        (lambda: fastpo.Support.cat([]), "parts: expected at least one, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (lambda: support[0], lambda: list(support)):
        with pytest.raises(TypeError, match="tokens: expected a slice, got int"):
            call()
