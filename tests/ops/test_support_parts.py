"""Supports of no words and of thousands, and parts of a `fastpo.Support`."""

from __future__ import annotations

import pytest
import torch

import fastpo
from fastpo import planner
from fastpo.ops.shards.gathered import HeadOptions
from fastpo.ops.support.score import kept_words


@pytest.mark.parametrize("shape", [(2, 3), (6,), (0, 3)])
def test_a_support_of_no_words_restricts_nobody(shape):
    labels = torch.zeros(shape, dtype=torch.int64)
    hidden, weight = torch.randn(*shape, 8), torch.randn(11, 8)
    nothing = torch.empty(*shape, 0, dtype=torch.int64)
    found = fastpo.linear_logps(hidden, weight, labels, support=nothing).logps
    torch.testing.assert_close(found, fastpo.linear_logps(hidden, weight, labels).logps)


def test_a_nucleus_of_thousands_of_words_beside_one_of_few():
    """More than are sorted at first, of some rows."""
    torch.manual_seed(0)
    sharp = torch.tensor([20.0, 0.5, 20.0, 1.0, 0.1]).unsqueeze(1)
    hidden, weight = sharp * torch.randn(5, 8), torch.randn(3000, 8)
    z = hidden.double() @ weight.double().t()
    ranked, order = z.sort(1, descending=True)
    p = ranked.softmax(1)
    inside = p.cumsum(1) - p < 0.9
    kept = torch.zeros_like(inside).scatter_(1, order, inside)
    assert kept.sum(1).le(1024).tolist() == [True, False, True, False, False]
    labels = z.argmax(1)
    stats = fastpo.linear_logps(
        hidden, weight, labels, support=fastpo.Support.rule(top_p=0.9), outputs=("logps", "lse")
    )
    over = z.masked_fill(~kept, -torch.inf)
    expected = over.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(stats.logps.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.lse.double(), over.logsumexp(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ties", "kept", "sorted_words"), [(1, 2, [2, 3]), (4, 5, [2, 3, 40])])
def test_a_nucleus_of_the_top_k_sorts_no_more_than_those(ties, kept, sorted_words, monkeypatch):
    """But where what comes behind them ties with the last."""
    topk, widths = torch.Tensor.topk, []
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k: widths.append(k) or topk(x, k))
    z = torch.zeros(1, 40)
    z[:, 0], z[:, 1 : 1 + ties] = 3.0, 1.0
    rule = fastpo.Support.rule(top_k=2, top_p=0.999)
    stats = fastpo.linear_logps(
        torch.ones(1, 1), z.t(), torch.zeros(1).long(), support=rule, outputs=("lse",)
    )
    torch.testing.assert_close(stats.lse, z[:, :kept].logsumexp(1))
    assert widths == sorted_words


def test_parts_of_a_support():
    support = fastpo.Support.of([[1, 2], [3], None])
    assert [len(part) for part in support.split([2, 1])] == [2, 1]
    for call, message in (
        (lambda: support.split([1, 1]), r"sizes: expected a sum of 3, got \[1, 1\]"),
        (lambda: support.split([4, -1]), r"sizes: expected a sum of 3, got \[4, -1\]"),
        (lambda: support[::2], r"tokens: expected a slice of step 1, got slice\(None, None, 2\)"),
        (lambda: fastpo.Support.cat([]), "parts: expected at least one, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (lambda: support[0], lambda: list(support)):
        with pytest.raises(TypeError, match="tokens: expected a slice, got int"):
            call()


def test_a_word_of_nan_is_among_those_of_a_rule():
    """Without it the others' log-probabilities would be numbers."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [torch.nan], [0.5], [0.0]])
    rule, labels = fastpo.Support.rule(top_k=3), torch.zeros(1, dtype=torch.int64)
    assert fastpo.linear_logps(hidden, weight, labels, support=rule).logps.isnan().all()


def test_a_word_that_was_drawn_is_kept_beside_those_of_a_rule(monkeypatch):
    """Whatever rounding put it behind the others; of every block of tokens its own."""
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(4, 8))
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=g), torch.randn(11, 8, generator=g)
    z = hidden @ weight.t()
    words = torch.cat((z.topk(2).indices, z.argmin(1, keepdim=True)), 1)
    found, mass = kept_words(
        fastpo.Support.rule(top_k=2), hidden, weight, None, words[:, 2], HeadOptions()
    )
    assert torch.equal(found.ids.view(6, 3), words.sort().values)
    torch.testing.assert_close(mass, z.softmax(1).gather(1, words).sum(1))


def test_the_words_of_one_token_alone_are_no_lists():
    message = "lists: expected a list of word ids for each token, got 3 at token 1"
    with pytest.raises(ValueError, match=message):
        fastpo.Support.of([[5], 3])
