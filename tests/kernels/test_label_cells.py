"""The label's cell of a tile of exponentials: there, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from _triton import DEVICE, MARKS

pytest.importorskip("triton")

from fastpo.kernels.anchored_label import anchored_label

pytestmark = MARKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "words", "first"), [(1, 1, 0), (5, 7, 16), (300, 40, 50)])
def test_writes_the_labels_cell_alone(n, words, first, dtype):
    labels = (torch.arange(n) + first - 2) % (first + words + 3)  # on both sides of the tile, too
    labels[0], labels[-1] = first, -100 if n > 1 else first
    own = -torch.rand(n).to(dtype)
    wide = torch.full((n + 2, words + 6), 7.0, dtype=dtype)
    expected = wide.clone()
    for row, label in enumerate(labels.tolist()):
        if first <= label < first + words:
            expected[row + 1, 3 + label - first] = own[row]
    wide = wide.to(DEVICE)
    anchored_label(wide[1:-1, 3:-3], own.to(DEVICE), labels.to(DEVICE), first)
    assert torch.equal(wide.cpu(), expected)
    assert (expected != 7.0).any()
