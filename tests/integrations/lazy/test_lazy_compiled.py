"""Lazy logits given to functions under torch.compile."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from _pairs import B, T, V, pair, results, size  # noqa: F401
from _tiny import one_thread  # noqa: F401


def spread(x):
    return x.logsumexp(-1) - x.mean(-1)


def compiled(function, backend="aot_eager"):
    torch.compiler.reset()
    return torch.compile(function, backend=backend)


READ_BEFORE = {
    "argmax": lambda x: x.argmax(-1),
    "logps": lambda x: x.log_softmax(-1)[..., :1].sum(),
    "words": lambda x: x.gather(-1, torch.zeros(B, T, 1, dtype=torch.int64)),
    "scaled": lambda x: x.div_(0.7).logsumexp(-1),
}


@pytest.mark.parametrize("before", READ_BEFORE)
def test_after_something_was_read(before):
    lazy, real, leaves = pair()
    for x in (lazy, real):
        READ_BEFORE[before](x)
    found, expected = results(compiled(spread), lazy, leaves), results(spread, real, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_attribute_grad_is_not_a_request_for_it():
    lazy, real, _ = pair()
    lazy.argmax(-1)
    with pytest.warns(UserWarning, match="not a leaf"):
        assert lazy.grad is None and real.grad is None


VIEWS = {
    "shifted": lambda x: x[:, :-1],
    "every_other": lambda x: x[:, ::2],
    "one": lambda x: x[:, -1],
    "turned": lambda x: x.transpose(0, 1),
    "probabilities": lambda x: x.softmax(-1)[:, 1:],
    "flat": lambda x: x[:, :-1].reshape(-1, V),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view(view):
    read, (lazy, real, leaves) = compiled(spread), pair()
    found = results(lambda x: read(VIEWS[view](x)), lazy, leaves)
    expected = results(lambda x: spread(VIEWS[view](x)), real, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_words_before_positions():
    """[B, V, T], which is not how the values lie in memory."""
    read, (lazy, real, leaves) = compiled(lambda x: x.exp().sum(1)), pair()
    found, expected = (results(lambda x: read(x.transpose(1, 2)), x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_change_in_place_without_gradient():
    """Inductor writes the values in ways that nobody counts, from the second call on."""
    halve = compiled(lambda x: x.div_(2.0).logsumexp(-1), "inductor")
    for _ in range(3):
        lazy, real, _ = pair()
        real.div_(2.0)
        torch.testing.assert_close(halve(lazy), real.logsumexp(-1))
        torch.testing.assert_close(lazy.logsumexp(-1), real.logsumexp(-1))
        torch.testing.assert_close(lazy.softmax(-1).amax(-1), real.softmax(-1).amax(-1))


def test_a_change_in_place_with_gradient():
    """Not with inductor, which mixes up what it saves of a subclass that changes."""
    halve, found = compiled(lambda x: x.div_(2.0).logsumexp(-1)), []
    lazy, real, leaves = pair()
    for x in (lazy, real):
        found.append(results(lambda x: halve(x) + x.logsumexp(-1), x, leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
