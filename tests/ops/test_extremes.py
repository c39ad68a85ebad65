"""Rows that are far from what a model gives: digits of what is next to nothing, and no NaN."""

from __future__ import annotations

import pytest
import torch
from _primitives import CALLS
from test_linear_logps import BACKENDS, DEVICE, DIFFERENTIABLE, run, run_reference

import fastpo
from fastpo.testing import make_head

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


@pytest.mark.parametrize(
    ("scale", "softcap"), [(1e4, None), (-1e4, None), (1e4, 2000.0), (1.0, 1e25), (1.0, 1e-25)]
)
@pytest.mark.parametrize("mode", ["frozen", "keep", "lean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_stay_finite(backend, mode, scale, softcap):
    inputs = make_head(12, 400, 16, device=DEVICE).like(torch.float32)
    with torch.no_grad():
        inputs.hidden.mul_(scale / inputs.hidden.norm(dim=1, keepdim=True))
    stats, grads = run(inputs, backend, mode, DIFFERENTIABLE, softcap=softcap)
    truth, _ = run_reference(inputs.like(torch.float64), DIFFERENTIABLE, softcap=softcap)
    assert ((stats.logps - truth.logps).abs() <= 1e-5 * (1 + truth.lse.abs())).all()
    assert all(getattr(stats, name).isfinite().all() for name in OUTPUTS)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("group")
def test_an_infinite_hidden_state_under_a_soft_cap_is_no_number(name):
    infinite, nan = (_with_a_bad_row(CALLS[name], bad) for bad in (float("inf"), float("nan")))
    assert infinite[0].isnan().any()
    for one, other in zip(infinite, nan, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def _with_a_bad_row(call, bad):
    leaves = call.leaves()
    with torch.no_grad():
        leaves["hidden"][int(leaves["mask"].nonzero()[0]), 3] = bad
    return call.gradients(leaves)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_words_of_infinite_logits_are_not_left_out_of_a_list(kind, bad):
    hidden = torch.ones(2, 1, device=DEVICE)
    hidden[0] = bad
    weight = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]], device=DEVICE)
    ids, logps = torch.tensor([[0, 1]] * 2, device=DEVICE), torch.full((2, 2), -1.0, device=DEVICE)
    found = fastpo.linear_topk_divergence(hidden, weight, ids, logps, kind=kind, tail=False)
    assert found.isnan().tolist() == [True, False]
