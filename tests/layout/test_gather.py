"""Copies and the sum of what comes back."""

from __future__ import annotations

import pytest
import torch

from fastpo.layout.gather import Copies, Run

CPU = torch.device("cpu")
RUNS = [Run(0, 0, 3), Run(3, 3, 2), Run(0, 6, 2), Run(5, 8, 1), Run(0, 9, 3)]


def copies():
    return Copies.of(RUNS, 6, 12, CPU)


def test_neighbours_are_one_run():
    assert copies().runs == (Run(0, 0, 5), Run(0, 6, 2), Run(5, 8, 1), Run(0, 9, 3))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_value_and_gradient(dim):
    torch.manual_seed(0)
    x = torch.randn(6, 6, 6, dtype=torch.float64, requires_grad=True)
    found = copies()(x, dim)
    index = torch.tensor(
        [0, 1, 2, 3, 4, 0, 0, 1, 5, 0, 1, 2]
    )  # a place without a run has the first
    expected = x.index_select(dim, index)
    assert torch.equal(found, expected)
    g = torch.randn_like(found)
    g.select(dim, 5).zero_()
    ours, own = (torch.autograd.grad(y, x, g)[0] for y in (found, expected))
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("dim", [0, 1])
def test_second_derivatives_and_transforms(dim):
    """It is linear, and its gradient, too: gathered again, but for places without a run."""
    torch.manual_seed(0)
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    keep = torch.ones(12, 1, dtype=torch.float64)
    keep[5] = 0.0

    def gathered(x):
        return copies()(x, dim) * (keep if dim == 0 else keep.T)

    assert torch.autograd.gradcheck(gathered, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: gathered(x).pow(3), x)

    def penalty(x):
        (grad,) = torch.autograd.grad(gathered(x).pow(3).sum(), x, create_graph=True)
        return grad.pow(2).sum()

    (expected,) = torch.autograd.grad(penalty(x), x)
    grads = torch.func.grad(lambda x: gathered(x).pow(3).sum())
    found = torch.func.grad(lambda x: grads(x).pow(2).sum())(x.detach())
    torch.testing.assert_close(found, expected)
    _, tangent = torch.func.jvp(grads, (x.detach(),), (torch.ones_like(x),))
    assert tangent.shape == x.shape and tangent.any()


def test_places_without_a_run_have_no_gradient():
    x = torch.zeros(6, requires_grad=True)
    g = torch.zeros(12)
    g[5] = 1.0
    (grad,) = torch.autograd.grad(copies()(x, 0), x, g.requires_grad_(), create_graph=True)
    assert not grad.any()
    (back,) = torch.autograd.grad(grad.sum(), g)
    assert back.tolist() == [1.0] * 5 + [0.0] + [1.0] * 6


def test_sixteen_addends_are_rounded_once():
    torch.manual_seed(0)
    many = Copies.of([Run(0, 3 * i, 3) for i in range(16)], 3, 48, CPU)
    x = torch.zeros(3, 64, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(48, 64, dtype=torch.bfloat16)
    found = [torch.autograd.grad(many(x, 0), x, g)[0] for _ in range(2)]
    truth = g.double().view(16, 3, 64).sum(0)
    assert torch.equal(*found) and torch.equal(found[0], truth.bfloat16())


def test_where_everything_stays_nothing_is_copied():
    whole = Copies.of([Run(0, 0, 2), Run(2, 2, 3)], 5, 5, torch.device("cpu"))
    x = torch.randn(5, 2)
    assert whole(x, 0) is x
    fewer = Copies.of([Run(0, 0, 4)], 5, 4, torch.device("cpu"))
    more = Copies.of([Run(0, 0, 5)], 5, 6, torch.device("cpu"))
    assert fewer(x, 0).shape == (4, 2) and more(x, 0).shape == (6, 2)
