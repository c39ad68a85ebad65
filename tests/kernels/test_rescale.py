"""Sums of rows from one anchor to another: against float64, as good as PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from _triton import DEVICE, MARKS
from torch import Tensor

from fastpo.ops.rows import torch as rows_torch
from fastpo.ops.rows import triton as rows_triton
from fastpo.testing import assert_as_good_as_eager

pytest.importorskip("triton")

pytestmark = MARKS

RISES = (0.0, 1e-3, 0.7, 0.0, 11.0, 60.0, 250.0)


def problem(h: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(h)
    total = torch.randn(len(RISES), h, generator=g)
    before = 30 * torch.randn(len(RISES), generator=g)
    return total.to(DEVICE), before.to(DEVICE), (before + torch.tensor(RISES)).to(DEVICE)


@pytest.mark.parametrize("h", [1, 70, 1024, 2500])
def test_matches_float64(h):
    total, before, anchors = problem(h)
    truth = total.double() * torch.exp(before.double() - anchors.double()).unsqueeze(1)
    ours, eager = total.clone(), total.clone()
    rows_triton.rescale(ours, before, anchors)
    rows_torch.rescale(eager, before, anchors)
    assert_as_good_as_eager("total", ours, eager, truth)
    assert torch.equal(ours[0], total[0]) and not ours[-1].any()


def test_a_first_anchor_leaves_nothing_of_what_was_there():
    """A tile without words: its anchor is the lowest number, not -inf."""
    total, before, anchors = problem(70)
    for nothing in (-math.inf, torch.finfo(torch.float32).min):
        before[:] = nothing
        ours = total.clone()
        rows_triton.rescale(ours, before, anchors)
        assert not ours.any()


def test_nan_reaches_its_row_only():
    total, before, anchors = problem(70)
    expected = total.clone()
    rows_triton.rescale(expected, before, anchors)
    before[1] = anchors[1] = math.nan
    rows_triton.rescale(total, before, anchors)
    assert total[1].isnan().all()
    others = [0, *range(2, len(RISES))]
    assert torch.equal(total[others], expected[others])


def test_writes_inside_its_slice():
    total, before, anchors = problem(40)
    wide = torch.full((len(RISES) + 2, 60), 7.0, device=DEVICE)
    wide[1:-1, 10:50] = total
    rows_triton.rescale(wide[1:-1, 10:50], before, anchors)
    rows_triton.rescale(total, before, anchors)
    assert torch.equal(wide[1:-1, 10:50], total)
    wide[1:-1, 10:50] = 7.0
    assert (wide == 7.0).all()


def test_no_rows():
    nothing = torch.empty(0, device=DEVICE)
    rows_triton.rescale(torch.empty(0, 5, device=DEVICE), nothing, nothing)
