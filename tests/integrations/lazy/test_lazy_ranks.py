"""Ranks and filters: a word's own logit is what it is compared with, to the last bit."""

from __future__ import annotations

import copy
import gc

import pytest

pytest.importorskip("transformers")

import torch
from _probes import Widest
from _tiny import one_thread  # noqa: F401
from torch import nn

from fastpo.integrations.lazy import blocks, calls
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.ops.rows import registry

B, T, H, V = 8, 31, 32, 211
LABELS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))[..., None]
SIZES = {"one block": 1 << 26, "blocks": 4 * V * 5, "rows": 4}


@pytest.fixture(autouse=True, params=SIZES)
def size(request, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": SIZES[request.param]})


def made(lazy, dtype=torch.float32, capped=False):
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V).to(dtype), torch.randn(B, T, H).to(dtype).requires_grad_()
    logits = promised(Promise.of(head, hidden)) if lazy else head(hidden)
    return torch.tanh(logits / 3) * 3 if capped else logits, [hidden, *head.parameters()]


def rank(x):
    return (x >= x.gather(-1, LABELS)).sum(-1)


def rank_by_logps(x):
    return rank(x.log_softmax(-1))


def rank_by_probabilities(x):
    return rank(x.softmax(-1))


def rank_of_a_view(x):
    """Of the words and of the rows, in the other order, by another name."""
    logps = x.log_softmax(-1)
    words = logps.gather(-1, LABELS).squeeze(-1)
    return torch.le(words[:, 1:].unsqueeze(-1), logps[:, 1:]).sum(-1)


def rank_of_the_second(x):
    few = torch.take_along_dim(x, torch.cat([LABELS, LABELS.flip(0)], -1), dim=-1)
    return (x >= few[..., 1:]).sum(-1)


def rank_of_read_logits(x):
    x.cumsum(-1)
    return rank(x) + rank_by_logps(x)


def rank_of_an_index(x):
    """The common way, on all logits of some rows."""
    logps = x.flatten(0, 1)[:20]
    words = logps[torch.arange(20), LABELS.flatten()[:20]]
    return (logps >= words[:, None]).sum(-1)


def rank_without_gradient(x):
    with torch.inference_mode():
        return rank(x.log_softmax(-1)) + rank_of_a_view(x)[:, :1]


def greatest(x):
    best = x.max(-1, keepdim=True).values
    return (x == best).sum(-1) + (x >= x.amax(-1, keepdim=True)).sum(-1)


def greatest_of_logps(x):
    return greatest(x.log_softmax(-1))


def greedy(x):
    """Of the numbers themselves."""
    word = x.argmax(-1, keepdim=True)
    found = (x.gather(-1, word) == x.max(-1, keepdim=True).values).squeeze(-1)
    logps = x.log_softmax(-1)
    return found & (logps.gather(-1, word).squeeze(-1) >= logps.max(-1).values)


def greatest_by_its_word(x):
    return (x > x.gather(-1, x.argmax(-1)[..., None])).sum(-1)


def top(x):
    values = x.topk(5).values
    return 1000 * (x >= values[..., -1:]).sum(-1) + (x < values[..., [-1]]).sum(-1)


def top_with_another_reading(x):
    x.cumsum(-1)
    return top(x) + top(x / 0.7) + top(x.log_softmax(-1))


def filtered(x):
    """nanoGPT's; a row has 3 words left."""
    return torch.cat([_filtered(x[:rows, -1].clone()) for rows in range(1, B + 1)])


def _filtered(part):
    values, _ = torch.topk(part, 3)
    part[part < values[:, [-1]]] = -float("inf")
    return part.isfinite().sum(-1)


def filtered_by_a_mask(x):
    values = x.topk(3).values[..., -1:]
    kept = x.masked_fill(x < values, -float("inf"))
    return kept.softmax(-1).gt(0).sum(-1) + kept.isinf().cumsum(-1)[..., -1]


READ = [rank, rank_by_logps, rank_by_probabilities, rank_of_a_view, rank_of_the_second]
READ += [rank_of_read_logits, rank_of_an_index, rank_without_gradient, greatest]
READ += [greatest_of_logps, greedy]
READ += [greatest_by_its_word, top, top_with_another_reading, filtered, filtered_by_a_mask]


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
def test_ranks_are_those_of_the_logits(read, capped):
    found, expected = (read(made(lazy, capped=capped)[0]) for lazy in (True, False))
    torch.testing.assert_close(found, expected)


# What does not depend on the last bits of a product in bfloat16.
EXACT = [lambda x: top(x) % 1000 > V - 5, lambda x: rank(x) < 1, lambda x: rank_by_logps(x) < 1]
EXACT += [greatest_by_its_word, lambda x: greatest(x) < 2]


@pytest.mark.parametrize("read", EXACT)
def test_a_word_reaches_itself_in_bfloat16(read):
    assert not read(made(True, torch.bfloat16)[0]).any()


def test_no_logits_are_made(monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V * 2})
    monkeypatch.setattr(Promise, "materialize", lambda self: pytest.fail("full logits"))
    logits, _ = made(True)
    with Widest() as widest:
        rank(logits)
        top(logits)
        greatest_by_its_word(logits)
    assert 2 * B * T * H < B * T * V // 3
    if registry.unavailable("cpu", torch.device("cpu")) is None:  # PyTorch copies picked words
        assert widest.elements <= max(H * V, 2 * B * T * H)
    rank_by_logps(logits)  # by a walk with tiles of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reading", [lambda x: x / 0.7, lambda x: x.log_softmax(-1)])
@pytest.mark.parametrize("of", [lambda x: x.topk(4), lambda x: x.max(-1, keepdim=True)])
def test_the_greatest_words_have_a_gradient(dtype, reading, of):
    found = []
    for lazy in (True, False):
        logits, leaves = made(lazy, dtype)
        out = of(reading(logits)).values
        loss = (out.float() * torch.arange(1, out.shape[-1] + 1)).square().mean()
        found.append((out, *torch.autograd.grad(loss, leaves)))
    slack = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(*found, check_dtype=False, rtol=slack, atol=slack)


def test_words_that_were_changed_are_other_numbers():
    found = []
    for lazy in (True, False):
        logits, _ = made(lazy)
        words = logits.gather(-1, LABELS).detach()
        words -= 0.5
        found.append((logits >= words).sum(-1))
    torch.testing.assert_close(*found)


def test_words_of_other_rows_are_other_numbers():
    found = []
    for lazy in (True, False):
        logits, _ = made(lazy)
        words = logits.gather(-1, LABELS)
        found.append((logits[:, 1:] >= words[:, :-1]).sum(-1))
    torch.testing.assert_close(*found)


def test_words_are_forgotten_and_copied_as_numbers():
    gc.collect()
    calls._picked.clear()
    logits, _ = made(True)
    words = logits.detach().gather(-1, LABELS)
    assert torch.equal(copy.deepcopy(words), words)
    view = words[1:]
    del words
    gc.collect()
    assert len(calls._picked) == 1
    del view
    gc.collect()
    assert not len(calls._picked)
