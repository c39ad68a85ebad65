"""Some words of lazy logits, as a padded vocabulary is cut, are lazy logits of a smaller head."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from _pairs import B, T, V, nothing_told, pair, results, size  # noqa: F401
from _probes import Widest
from _tiny import one_thread  # noqa: F401

from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.lazy.logits import LazyLogits

N = 41
GENERATOR = torch.Generator().manual_seed(1)
LABELS = torch.randint(0, N, (B, T), generator=GENERATOR)
IDS = torch.randint(-V, V, (N,), generator=GENERATOR)
KEPT = torch.arange(V) % 5 > 0


def loss(x, labels=LABELS):
    return F.cross_entropy(x.flatten(0, -2), labels.flatten(), label_smoothing=0.1)


def entropy(x):
    return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)


def rank(x):
    """Among the first words, of a number of all."""
    best = x.log_softmax(-1).gather(-1, LABELS[..., None])
    return (x[..., :N].log_softmax(-1) >= best).sum(-1) + x.logsumexp(-1)


SOME = {
    "first": lambda x: loss(x[..., :N]),
    "first_of_some_rows": lambda x: loss(x[:, :-1, 0:N], LABELS[:, 1:]),
    "first_but_some": lambda x: (x / 0.7)[:, :, :-3].logsumexp(-1),
    "first_of_first": lambda x: x[..., :N][1, :, :9].softmax(-1).square().sum(-1),
    "first_of_masked_rows": lambda x: x[..., :N][LABELS > 9].float().logsumexp(-1),
    "first_twice": lambda x: (x[..., :N].exp() * x[..., :N].log_softmax(-1)).sum(-1),
    "entropy": lambda x: entropy(x[..., :N]),
    "all": lambda x: loss(x[..., : V + 7]),
    "greatest": lambda x: x[..., :N].max(-1).values,
    "joined": lambda x: torch.cat([x[1:, :, :N], x[:1, :, :N]]).logsumexp(-1),
    "rank": rank,
    "listed": lambda x: loss(x[..., IDS]),
    "selected": lambda x: entropy(x[:, 1:].index_select(-1, IDS % V)),
    "by_a_mask": lambda x: x[0, ..., KEPT].softmax(-1).square().sum(-1),
}


@pytest.mark.parametrize("name", SOME)
def test_values_and_gradients(name):
    lazy, real, leaves = pair()
    found, expected = (results(SOME[name], x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not cell.told and lazy._cell.values is None


@pytest.mark.parametrize("index", [slice(N), IDS, KEPT])
def test_they_wait(index, monkeypatch):
    """As many words as would fill memory, however they are picked."""
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V})
    lazy, _, leaves = pair()
    with Widest() as made:
        found = lazy[..., index]
        assert isinstance(found, LazyLogits)
        torch.autograd.grad(found.square().sum(), leaves)
    assert made.elements < B * T * N


def test_they_lie_in_memory_as_a_view_would():
    for x in pair()[:2]:
        first = x[:, 1:, :N]
        facts = first.stride(), first.is_contiguous(), first.storage_offset()
        assert facts == ((T * V, V, 1), False, V)
        assert first[:, 1:].stride() == first.stride()
        for copy in (first.contiguous(), first.clone(), first[[0, 1]], 2 * first):
            assert copy.is_contiguous() and copy.stride()[1:] == (N, 1)


def halved(x):
    x[..., :N] /= 2
    return x.logsumexp(-1)


def first_halved(x):
    first = x[..., :N]
    first /= 2
    return first.logsumexp(-1)


@pytest.mark.parametrize("read", [halved, first_halved])
def test_they_change_in_place(read):
    lazy, real, leaves = pair()
    found, expected = (results(read, x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_change_of_them_is_one_of_all():
    lazy = pair()[0]
    first = lazy[..., :N]
    first.zero_()
    with pytest.raises(RuntimeError, match="expected no change in place through another view"):
        lazy.logsumexp(-1)
    lazy = pair()[0]
    first = lazy[..., :N]
    lazy.mul_(2)
    with pytest.raises(RuntimeError, match="expected no change in place through another view"):
        first.logsumexp(-1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_look_without_gradient_leaves_it_to_the_loss(mode):
    lazy, real, leaves = pair()
    with mode():
        lazy[..., :N].logsumexp(-1)
    found, expected = (results(lambda x: loss(x[..., :N]), x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_word_below_zero_is_none_to_index_select():
    for x in pair()[:2]:
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            x.index_select(-1, IDS)


def filled(x, index, value=float("-inf")):
    x[index] = value
    return x.float().logsumexp(-1)


FILLED = {
    "listed": lambda x: filled(x, (..., [3, -1])),
    "by_ids": lambda x: filled(x, (slice(None), slice(None), IDS)),
    "by_a_mask": lambda x: filled(x * 2, (..., KEPT), 0.5),
    "last": lambda x: filled(x, (..., slice(N, None))) + x.softmax(-1).square().sum(-1),
    "one": lambda x: filled(x[:, 1:].contiguous().clone(), (..., 7), -2),
    "twice": lambda x: filled(x, (..., 7), 0) + filled(-x, (..., 8), 0),
    "of_one_row": lambda x: filled(x[0, 1].clone() + x.sum(), (IDS,), 1.0),
}


@pytest.mark.parametrize("name", FILLED)
def test_words_of_every_row_are_filled(name):
    lazy, real, leaves = pair()
    found, expected = (results(FILLED[name], x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not cell.told


def test_words_of_some_rows_are_filled_too():
    for index in ((0, ..., 3), (slice(1, None), slice(None), IDS), IDS[:2] % B, (None, ..., 3)):
        lazy, real, leaves = pair()
        found, expected = (
            results(lambda x, i=index: filled(x, i, 1), x, leaves) for x in (lazy, real)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_words_that_are_not_there_are_not_filled():
    for x in pair()[:2]:
        with pytest.raises(IndexError, match="out of"):
            x[..., [V]] = 0.0


TURNED = {
    "dtype": lambda x: F.cross_entropy(x.bfloat16().transpose(1, 2).float(), LABELS),
    "same_dtype": lambda x: F.cross_entropy(x.transpose(1, 2).float(), LABELS),
    "log_softmax": lambda x: F.nll_loss(F.log_softmax(x.permute(0, 2, 1), dim=1), LABELS),
    "softmax": lambda x: F.nll_loss(x.transpose(-1, 1).to(torch.float32).softmax(-2), LABELS),
    "constant": lambda x: F.cross_entropy(constant(x).double(), LABELS).float() + x.mean(),
    "first": lambda x: F.cross_entropy(x[..., :N].transpose(1, 2).float(), LABELS),
}


def constant(x):
    with torch.no_grad():
        return x.transpose(1, 2)


@pytest.mark.parametrize("name", TURNED)
def test_turned(name):
    """[B, V, T], as PyTorch's losses have it."""
    lazy, real, leaves = pair()
    found, expected = (results(TURNED[name], x, leaves) for x in (lazy, real))
    close = 1e-2 if name == "dtype" else 1e-4
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    assert not cell.told


@pytest.mark.parametrize("index", [slice(N), IDS])
def test_they_are_taken_before_the_head_changes(index, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 1})
    lazy, _, (_, weight, _) = pair()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="expected to be read before"):
        lazy[..., index].logsumexp(-1)
