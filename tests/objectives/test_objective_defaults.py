"""PyTorch's defaults and autocast have no part in an objective or a quantity."""

import pytest
import torch
from test_objectives import CASES, KEYS, evaluate, problem
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastpo import TokenStats, quantities

DEFAULTS = (torch.bfloat16, torch.float64)
KINDS = ("logps", "logratios", "lengths", "token_logps", "mask")
NAMES = [f"{side}_{kind}" for side in ("chosen", "rejected") for kind in KINDS]


def same(found: Tensor, expected: Tensor) -> bool:
    alike = (found.dtype, found.device) == (expected.dtype, expected.device)
    return alike and torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(("key", "case"), CASES)
def test_the_same_bits_under_any_default(key, case, defaults):
    function, row, inputs, hyper = problem(key, case)
    plain, dplain = evaluate(function, row, inputs, hyper, torch.float32)
    for dtype in DEFAULTS:
        defaults(dtype)
        found, dfound = evaluate(function, row, inputs, hyper, torch.float32)
        defaults()
        assert all(map(same, found, plain))
        assert dfound.keys() == dplain.keys()
        assert all(same(dfound[name], dplain[name]) for name in dplain)


@pytest.mark.parametrize("key", KEYS)
def test_the_same_bits_under_autocast(key):
    """Trainers compute their loss under it; an objective's precision is its inputs'."""
    function, row, inputs, hyper = problem(key)
    plain = tree_leaves(evaluate(function, row, inputs, hyper, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = tree_leaves(evaluate(function, row, inputs, hyper, torch.float32))
    assert all(map(same, found, plain))


def test_quantities_have_the_same_bits_under_any_default(defaults):
    rows, width = 4, 3
    drawn = torch.rand(rows, width, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([3, 0, 2, 1])
    scored = torch.arange(width) < lengths.unsqueeze(1)
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    padded, packed = TokenStats(logps=-drawn), TokenStats(logps=-drawn[scored])
    given = []
    for to in (None, *DEFAULTS):
        defaults(to)
        one = quantities.padded(padded, scored, ref=padded)
        other = quantities.packed(packed, offsets, width=width, ref=packed)
        given.append([q[name] for q in (one, other) for name in NAMES])
    defaults()
    for found in given[1:]:
        assert all(map(same, found, given[0]))
