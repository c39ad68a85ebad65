"""Sums over the words that a walk knows, in the ways that distillations write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from _tiny import one_thread  # noqa: F401
from torch import nn

from fastpo.integrations.lazy import blocks, cell, expressions
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.testing import assert_as_good_as_eager

B, T, H, V = 3, 5, 8, 53
MASK = (torch.arange(B * T).view(B, T, 1) % 3 > 0).float()


@pytest.fixture(autouse=True)
def blocks_of_two_rows(monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V * 2})
    monkeypatch.setattr(cell, "told", set())


def masked(product, *logits):
    """As MiniLLM, OpenRLHF and torchtune have it."""
    infinite = torch.isinf(logits[0])
    for x in logits[1:]:
        infinite = infinite | torch.isinf(x)
    return torch.masked_fill(product, infinite, 0).sum(-1)


def teacher(y):
    return y.softmax(-1).detach()


def scaled_rows(x, y):
    weight = torch.linspace(0.5, 1.5, T, requires_grad=True)[:, None]
    return (weight * (teacher(y) * x.log_softmax(-1))).sum(-1)


def mixture(s, t, beta):
    """What TRL's GKD sums, whose beta is a tensor."""
    beta = torch.tensor(beta)
    mean = torch.logsumexp(torch.stack([s + torch.log(1 - beta), t + torch.log(beta)]), dim=0)
    teacher, student = (F.kl_div(mean, x, reduction="none", log_target=True) for x in (t, s))
    return beta * teacher + (1 - beta) * student


def halves(s, t):
    half = math.log(0.5)
    mean = torch.stack([t + half, s + half]).logsumexp(0)
    both = [F.kl_div(mean, x, reduction="none", log_target=True) for x in (s, t)]
    return 0.5 * (both[0] + both[1])


def words(read):
    return lambda x, y: read((x / 0.7).log_softmax(-1), (y / 0.7).log_softmax(-1))


def of_teacher(read):
    return lambda x, y: read(x.log_softmax(-1), y.detach().log_softmax(-1))


WALKED = {
    "mixture": words(lambda s, t: mixture(s, t, 0.3).sum(-1)),
    "mixture_with_a_teacher": of_teacher(lambda s, t: mixture(s, t, 0.9)[MASK[..., 0] > 0].sum()),
    "mixture_of_halves": of_teacher(lambda s, t: halves(s, t).mean()),
    "all_of_a_kl": of_teacher(
        lambda s, t: F.kl_div(s, t, reduction="none", log_target=True)[MASK[..., 0] > 0].mean()
    ),
    "cross_entropy": lambda x, y: -(teacher(y) * x.log_softmax(-1)).sum(-1),
    "exp": lambda x, y: (x.log_softmax(-1) * y.detach().log_softmax(-1).exp()).sum(-1),
    "of_some_rows": lambda x, y: (teacher(y[:, 1:]) * x[:, 1:].log_softmax(-1)).sum(-1),
    "negative": lambda x, y: torch.sum(-(teacher(y) * (x / 2).log_softmax(-1)), dim=-1),
    "viewed": lambda x, y: (teacher(y).view(-1, V) * x.view(-1, V).log_softmax(-1)).sum(-1),
    "soft_labels": lambda x, y: F.cross_entropy(
        x.view(-1, V), teacher(y).view(-1, V), reduction="none"
    ),
    "rows_masked": lambda x, y: (MASK * (teacher(y) * x.log_softmax(-1))).sum(2),
    "rows_weighed": scaled_rows,
    "halved": lambda x, y: (0.5 * (teacher(y) * x.log_softmax(-1))).sum(-1),
    "infinite_masked": lambda x, y: masked(teacher(y) * x.log_softmax(-1), x),
    "both_masked": lambda x, y: masked(teacher(y) * x.log_softmax(-1), x, y),
    "log_of_softmax": lambda x, y: (y.softmax(-1) * (y.softmax(-1).log() - x.log_softmax(-1))).sum(
        -1
    ),
}


def results(read, lazy, dtype=torch.float32, infinite=()):
    logits, leaves = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        head, hidden = nn.Linear(H, V, bias=bool(infinite)), 2 * torch.randn(B, T, H)
        if seed in infinite:
            head.bias.data[40:] = float("-inf")
        head, hidden = head.to(dtype), hidden.to(dtype).requires_grad_()
        logits.append(promised(Promise.of(head, hidden)) if lazy else head(hidden))
        leaves += [hidden, *head.parameters()]
    found = read(*logits)
    grads = torch.autograd.grad(found.sum(), leaves, materialize_grads=True)
    return [found.detach(), *grads]


def no_blocks(*args):
    raise AssertionError("expected a walk, got blocks")


@pytest.mark.parametrize("name", WALKED)
def test_values_and_gradients(name, monkeypatch):
    monkeypatch.setattr(expressions, "reduced", no_blocks)
    read = WALKED[name]
    found, eager = results(read, True), results(read, False)
    for each in zip(found, eager, results(read, False, torch.float64), strict=True):
        assert_as_good_as_eager(name, *each)
    assert not cell.told


def test_a_trained_p_is_read_by_blocks():
    """Its gradient would be the difference of those of a divergence and an entropy."""

    def read(x, y):
        return (y.softmax(-1) * (x / 2).log_softmax(-1)).sum(-1)

    found, eager = results(read, True), results(read, False)
    for each in zip(found, eager, results(read, False, torch.float64), strict=True):
        assert_as_good_as_eager("both", *each)


@pytest.mark.parametrize(
    "shares",
    [
        (0.3, 0.7, 0.4, 0.6),
        (0.3, 0.3, 0.3, 0.7),
        (-0.5, 1.5, -0.5, 1.5),
        (0.7, 0.3) * 2,
        (-1.0, 1.0, 0.4, 0.6),  # nothing together
        (0.3, 0.7, 10**400, 1),  # beyond any float
    ],
)
def test_other_sums_of_two_divergences_from_a_mean(shares):
    """Of other weights than the mean's own, or than any mean's."""

    def read(x, y):
        s, t = x.log_softmax(-1), y.log_softmax(-1)
        of_s, of_t, a, b = shares
        mean = torch.logsumexp(torch.stack([s + math.log(abs(a)), t + math.log(abs(b))]), dim=0)
        from_s, from_t = (F.kl_div(mean, z, reduction="none", log_target=True) for z in (s, t))
        return (of_t * from_t + of_s * from_s).sum(-1)

    found, eager = results(read, True), results(read, False)
    for each in zip(found, eager, results(read, False, torch.float64), strict=True):
        assert_as_good_as_eager("mean", *each, factor=4.0)  # as linear_divergence


@pytest.mark.parametrize("heads", [(0,), (0, 1)])
def test_infinite_terms_are_left_out(heads):
    """No walk leaves out what p > 0 gives an infinite logarithm."""
    read = WALKED["infinite_masked"]
    found, eager = results(read, True, infinite=heads), results(read, False, infinite=heads)
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
    assert bool(found[0].isfinite().all())


def test_a_mask_of_other_logits_is_no_mask_of_these():
    def read(x, y):
        return masked(x.softmax(-1) * x.log_softmax(-1), y)

    found, eager = results(read, True, infinite=(1,)), results(read, False, infinite=(1,))
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)


def test_float32_of_16_bits(monkeypatch):
    monkeypatch.setattr(expressions, "reduced", no_blocks)

    def read(x, y):
        wide, y = {"dim": -1, "dtype": torch.float32}, y.detach()
        p, q = F.softmax(y, **wide), F.log_softmax(x, **wide)
        return (p * q).sum(-1) - (p * F.log_softmax(y, **wide)).sum(-1)

    found, eager = (results(read, lazy, torch.bfloat16) for lazy in (True, False))
    torch.testing.assert_close(found, eager, rtol=0.05, atol=0.05)
    assert found[0].dtype == torch.float32


SUBTRACTED = {
    "keepdim": lambda x: x - x.logsumexp(-1, keepdim=True),
    "none": lambda x: torch.sub(x, torch.logsumexp(x, dim=-1)[..., None]),
    "of_another_reading": lambda x: x / 0.7 - (x / 0.7).logsumexp(-1).unsqueeze(-1),
}


@pytest.mark.parametrize("name", SUBTRACTED)
def test_logits_without_their_log_sum_exp_are_log_probabilities(name):
    """In 16 bits the gradients of the two cancel, each rounded by itself."""
    torch.manual_seed(0)
    labels, weights = torch.randint(V, (B, T)), torch.linspace(0.5, 1.5, V)
    head = nn.Linear(H, V, bias=False).bfloat16()
    sure = 4 * head.weight.detach()[labels].float()
    hidden = (sure + 0.3 * torch.randn(B, T, H)).bfloat16()

    def found(kind):
        own = nn.Linear(H, V, bias=False).to(kind.dtype).requires_grad_()
        own.weight.data.copy_(head.weight.data)
        x = hidden.to(kind.dtype).requires_grad_()
        logits = kind.read(own, x)
        total = (SUBTRACTED[name](logits).exp() * weights.to(logits.dtype)).sum(-1)
        return [total, *torch.autograd.grad(total.sum(), [x, own.weight])]

    truth = found(Kind(torch.float64, lambda own, x: own(x)))
    eager = found(Kind(torch.bfloat16, lambda own, x: own(x).float()))
    lazy = found(Kind(torch.bfloat16, lambda own, x: promised(Promise.of(own, x)).float()))
    for true, theirs, ours in zip(truth, eager, lazy, strict=True):
        assert (ours - true).norm() <= 1.2 * (theirs - true).norm()


class Kind(NamedTuple):
    dtype: torch.dtype
    read: Callable[[nn.Module, torch.Tensor], torch.Tensor]


def constant(x, lse):
    return x - lse.detach()


def of_other_rows(x, lse):
    return x - lse.flip(0)


def hooked(x, lse):
    lse.register_hook(lambda grad: 3 * grad)
    return x - lse


def asked(x, lse):
    lse.retain_grad()
    return x - lse


def compared(x, lse):
    return (x >= lse) * x + (lse - x)


@pytest.mark.parametrize("read", [constant, of_other_rows, hooked, asked, compared])
def test_what_is_another_difference(read):
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H, requires_grad=True)
    found = []
    for x in (promised(Promise.of(head, hidden)), head(hidden)):
        total = read(x, x.logsumexp(-1, keepdim=True)).exp().sum(-1)
        found.append([total, *torch.autograd.grad(total.sum(), [hidden, *head.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_log_sum_exp_that_was_changed():
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H)
    with torch.no_grad():
        for x in (promised(Promise.of(head, hidden)), head(hidden)):
            lse = x.logsumexp(-1, keepdim=True)
            assert (x - lse).exp().sum(-1).allclose(torch.ones(B, T))
            assert not (x - lse.add_(1)).exp().sum(-1).allclose(torch.ones(B, T))
