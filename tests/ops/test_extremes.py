"""Rows that are far from what a model gives: digits of what is next to nothing, and no NaN."""

from __future__ import annotations

import pytest
import torch
from test_linear_logps import BACKENDS, DEVICE

import fastpo

OUTPUTS = tuple(fastpo.TokenStats._fields)
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def row(*logits, label=0, **options):
    """Statistics of one token with these logits."""
    hidden, weight = torch.ones(1, 1, device=DEVICE), torch.tensor(logits, device=DEVICE)
    labels = torch.tensor([label], device=DEVICE)
    return fastpo.linear_logps(hidden, weight[:, None], labels, outputs=OUTPUTS, **options)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_digits_of_a_peaked_row(backend, label):
    found = row(0.0, -60.0, -70.0, label=label, backend=backend)
    others = torch.tensor([-60.0, -70.0], dtype=torch.float64)
    mass = others.exp().sum()
    expected = {
        "logps": -mass if label == 0 else others[0],
        "entropy": mass - (others * others.exp()).sum(),
        "log_sum_sq_probs": -2 * mass,
        "lse": mass,
    }
    if label != 0:  # beside a 1 that is another word's
        expected = {"logps": expected["logps"]}
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(found, name).double().cpu(), value[None], rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_logits_are_far_below_nothing(backend):
    logits = torch.linspace(-2, 1, 70)
    for label in (3, 69):
        found = row(*(logits - 512).tolist(), label=label, backend=backend)
        expected = row(*logits.tolist(), label=label, backend=backend)
        assert torch.equal(found.is_top1, expected.is_top1) and bool(found.is_top1) == (label == 69)
        for name in ("logps", "entropy", "log_sum_sq_probs"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_beside_a_label_that_is_no_word(backend):
    found = row(1.0, 2.0, float("-inf"), label=2, backend=backend)
    expected = row(1.0, 2.0, backend=backend)
    assert found.logps.isneginf().all() and not found.is_top1.any()
    for name in ("entropy", "log_sum_sq_probs", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_digits_of_the_gradient_of_a_peaked_row(backend, listed):
    """1 - p of the word that has all the mass is the sum of the others' p."""
    others = torch.tensor([-60.0, -70.0], device=DEVICE)
    hidden, weight = torch.ones(1, 1, device=DEVICE), torch.zeros(3, 1, device=DEVICE)
    weight[1:, 0] = others
    weight.requires_grad_()
    if listed:
        found = fastpo.linear_topk(hidden, weight, 1, backend=backend).values
    else:
        label = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        found = fastpo.linear_logps(hidden, weight, label, backend=backend).logps
    (grad,) = torch.autograd.grad(found.sum(), weight)
    p = others.double().exp()
    expected = torch.cat((p.sum()[None], -p))[:, None]
    torch.testing.assert_close(grad.double().cpu(), expected.cpu(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_no_number_where_nothing_is_scored(backend, trained):
    """As of a loss under `torch.where`, whose derivative at 0 is infinite."""
    hidden = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    weight = torch.eye(2, device=DEVICE).requires_grad_(trained)
    labels = torch.tensor([0, -100, 1], device=DEVICE)
    logps = fastpo.linear_logps(hidden, weight, labels, backend=backend).logps
    torch.where(labels >= 0, (-logps).sqrt(), 0).sum().backward()
    assert hidden.grad[1].eq(0).all() and hidden.grad[[0, 2]].isfinite().all()
    assert not trained or weight.grad.isfinite().all()
