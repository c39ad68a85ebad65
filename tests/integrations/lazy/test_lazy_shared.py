"""Lazy logits that change while others hold views of their values, or were made of them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from _tiny import one_thread  # noqa: F401
from torch import nn

from fastpo.integrations.lazy import blocks
from fastpo.integrations.lazy.logits import LazyLogits, promised
from fastpo.integrations.lazy.promise import Promise

B, T, H, V = 3, 7, 8, 31
LABELS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
ROWS = torch.linspace(0.5, 1.5, T)[:, None]


@pytest.fixture(autouse=True, params=["one block", "a row"])
def size(request, monkeypatch):
    if request.param == "a row":
        monkeypatch.setattr(blocks, "BYTES", {"cpu": 1})


def results(read, lazy):
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H, requires_grad=True)
    out = read(promised(Promise.of(head, hidden)) if lazy else head(hidden))
    found = [x + 0 for x in (out if isinstance(out, tuple) else (out,))]
    grads = torch.autograd.grad(sum(x.square().sum() for x in found), [hidden, *head.parameters()])
    return found, grads


# A view of the values lives while they change


def scaled_under_a_view(x):
    x[:, 1:, 3] = -5.0
    shifted = x[:, :-1]
    x /= 0.7
    return shifted.log_softmax(-1)[..., 2], x.logsumexp(-1)


def changed_in_turns(x):
    x[:, 1:, 3] = -5.0
    view = x.squeeze(0)
    x.clamp_(-1, 1)
    view.div_(0.7)
    x.clamp_(-1, 1)
    return view.logsumexp(-1), x.square().sum(-1)


def words_of_scaled_logits(x):
    words = x[..., 3:9]
    x.mul_(2)
    return words.square().sum(-1), x.square().sum(-1)


def read_without_gradient(x):
    words = x[..., 3:9]
    x.mul_(2)
    with torch.no_grad():
        best = x.argmax(-1, keepdim=True)
    return words.sum(-1), x.gather(-1, best)


def hook_after_a_change(x):
    x[..., 7] *= 2
    x.retain_grad()
    x.square().sum().backward(retain_graph=True)
    return x.grad * x


def backward_after_a_change(x):
    x[..., 7] *= 2
    (grad,) = torch.autograd.grad(x, x, torch.ones_like(x), retain_graph=True)
    return x * grad


def exponentials_in_place(x):
    words = x[..., 3:9]
    x.exp_()
    return words.sum(-1), x.logsumexp(-1)


SHARED = [scaled_under_a_view, changed_in_turns, words_of_scaled_logits, read_without_gradient]
SHARED += [hook_after_a_change, backward_after_a_change, exponentials_in_place]


@pytest.mark.parametrize("read", SHARED)
def test_a_change_is_one_for_a_view_and_the_logits(read):
    torch.testing.assert_close(results(read, True), results(read, False), rtol=1e-4, atol=1e-4)


# What was made of logits stays, all of it and its gradient, when they change


def top_p_before_a_temperature(x):
    p = x.softmax(-1)
    x.div_(0.7)
    return p.cumsum(-1), x.logsumexp(-1)


def some_rows_of_it(x):
    p = x.sigmoid()
    x.mul_(ROWS)
    return p[:, 1:].cumsum(-1), p[:, 1:].square().sum(-1), x.logsumexp(-1)


def scaled_after_words_changed(x):
    masked = x.masked_fill(torch.arange(V) % 3 == 0, -3.0)
    x[..., :4] = x[..., :4] * 2
    masked.div_(0.7)
    return masked.cumsum(-1)[..., -1], masked.logsumexp(-1)


def of_both(x):
    p = x.softmax(-1)
    x.mul_(2)
    return (p * x).sum(-1), (p * x).cumsum(-1)


def hooked_before(x):
    x.register_hook(lambda grad: 2 * grad)
    p = x.sigmoid()
    x.div_(ROWS)
    return p[:, 1:].cumsum(-1), p[:, 1:].square().sum(-1)


MADE = [top_p_before_a_temperature, some_rows_of_it, scaled_after_words_changed, of_both]
MADE += [hooked_before]


@pytest.mark.parametrize("read", MADE)
def test_what_was_made_of_logits_stays(read):
    torch.testing.assert_close(results(read, True), results(read, False), rtol=1e-4, atol=1e-4)


# No copies


def of_the_same_dtype(x):
    with torch.no_grad():
        same = x.float().to("cpu").contiguous()
    return same.logsumexp(-1)


def cast_and_scaled(x):
    x.float().div_(0.7)
    return x.logsumexp(-1)


@pytest.mark.parametrize("read", [of_the_same_dtype, cast_and_scaled])
def test_a_cast_to_the_same_dtype_is_the_tensor_itself(read):
    torch.testing.assert_close(results(read, True), results(read, False), rtol=1e-4, atol=1e-4)


def test_a_cast_of_what_was_made_is_the_tensor_itself():
    logits = promised(Promise.of(nn.Linear(H, V), torch.randn(B, T, H)))
    p = logits.softmax(-1)
    if isinstance(p, LazyLogits):
        assert p.float() is p and p.to(torch.float32) is p
        assert p.to(torch.float32, copy=True) is not p and p.bfloat16() is not p


@pytest.mark.parametrize("by", [0, 0.0])
def test_divided_by_zero_in_place(by):
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H)
    with torch.no_grad():
        found = promised(Promise.of(head, hidden)).div_(by)
        torch.testing.assert_close(found + 0, head(hidden) / by)
