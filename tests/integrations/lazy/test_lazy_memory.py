"""Lazy logits where it matters in which memory values lie: copies, storages, NumPy arrays."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from _pairs import B, T, V, pair, results, size  # noqa: F401
from _tiny import one_thread  # noqa: F401

from fastpo.integrations.lazy import blocks, cell

IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
MASK = IDS > 9


COPIES = {
    "masked": lambda x: x.softmax(-1)[MASK],
    "listed": lambda x: x.sigmoid()[[0, 1]],
    "exp": lambda x: x.exp()[MASK],
    "contiguous": lambda x: x.softmax(-1)[:, :-1].contiguous(),
    "reshaped": lambda x: x.softmax(-1)[:, :-1].reshape(-1, V),
    "view_of_a_copy": lambda x: x.softmax(-1)[MASK][1:],
    "selected": lambda x: x.log_softmax(-1).exp().index_select(1, torch.tensor([0, 2])),
    "log_probabilities": lambda x: x.log_softmax(-1)[MASK].neg(),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_rows_may_change_in_place(copy):
    """What made the rows has kept its results for the backward."""

    def read(x):
        rows = COPIES[copy](x)
        rows.sqrt_()
        return rows.log().mean()

    lazy, real, leaves = pair()
    found, expected = results(read, lazy, leaves), results(read, real, leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_view_of_saved_rows_may_not():
    """As with the model's own: nothing is copied for that."""
    for x in pair()[:2]:
        rows = x.softmax(-1).reshape(-1, V)
        rows.sqrt_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            rows.log().sum().backward()


WORDS = {
    "labels": lambda x: x.log_softmax(-1).view(-1, V)[torch.arange(B * T), IDS.flatten()],
    "of_texts": lambda x: x[torch.arange(B)[:, None], torch.arange(T), IDS],
    "of_a_distribution": lambda x: x.softmax(-1)[torch.arange(B), 2, torch.arange(B) - B],
    "masked": lambda x: x.log_softmax(-1)[MASK, IDS[MASK]],
    "of_all": lambda x: x[:, -1, [7, 11]],
    "of_one_text": lambda x: (x * torch.linspace(0.5, 1.5, V))[0, :, torch.tensor([[-1, 3]])],
    "of_one_row": lambda x: x[0, 0][[1, 1]],
    "none": lambda x: x[..., torch.tensor([], dtype=torch.int64)],
}


@pytest.mark.parametrize("name", WORDS)
def test_words_that_are_indexed(name, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V})
    monkeypatch.setattr(cell, "told", set())
    lazy, real, leaves = pair()
    found, expected = (results(WORDS[name], x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not cell.told and lazy._cell.values is None


def fill(x, mask):
    x[mask] = -0.5
    return x.logsumexp(-1)


FILLED = {
    "by_itself": lambda x: fill(x, x < -0.5),
    "by_an_alias": lambda x: fill(x, x.detach() < -0.5),
    "by_a_function_of_it": lambda x: fill(x, x.softmax(-1) < 0.01),
    "a_function_by_it": lambda x: fill(x * 2, x < -0.5) + x.exp().sum(-1),
    "a_copy_by_itself": lambda x: fill(y := x[:, 1:].clone(), y < 0) + x[:, 1:].mean(-1),
    "twice": lambda x: fill((x * 2).masked_fill_(x < -0.5, 1.0), x > 0.5),
}


@pytest.mark.parametrize("name", FILLED)
def test_words_filled_in_by_a_mask(name):
    lazy, real, leaves = pair()
    found, expected = (results(FILLED[name], x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CHANGED = {
    "added": lambda x: x.add_(torch.linspace(-1, 1, V), alpha=2),
    "subtracted": lambda x: (2 * x).sub_(0.1).masked_fill_(~MASK[..., None], 1.0),
    "clamped": lambda x: x.clamp_(-0.5, 0.5).clamp_(max=0.4),
    "by_a_function_of_others": lambda x: (2 * x).sub_(x.softmax(-1)).mul_(x.exp()),
    "by_itself": lambda x: x.sub_(x.exp()),
    "of_another_dtype": lambda x: x.bfloat16().sub_(x),
}


@pytest.mark.parametrize("name", CHANGED)
def test_word_by_word_in_place(name, size, monkeypatch):  # noqa: F811
    """By blocks, if it is not of itself."""
    monkeypatch.setattr(cell, "told", set())
    lazy, real, leaves = pair()
    found, expected = (
        results(lambda x: CHANGED[name](x).float().square().sum(-1), x, leaves)
        for x in (lazy, real)
    )
    close = 0.05 if name == "of_another_dtype" else 1e-4
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    assert not cell.told or name == "by_itself"


INTO = {
    "add_": lambda real, x: real.add_(x),
    "mul_": lambda real, x: real.mul_(x),
    "masked_fill_": lambda real, x: real.masked_fill_(x > 0, 0.5),
    "__setitem__": lambda real, x: real.__setitem__(x > 0, 0.5),
}


@pytest.mark.parametrize("name", INTO)
def test_a_real_tensor_changes_by_lazy_logits(name):
    lazy, real, _ = pair()
    found, expected = torch.ones(B, T, V), torch.ones(B, T, V)
    with torch.no_grad():
        INTO[name](found, lazy)
        INTO[name](expected, real)
    torch.testing.assert_close(found, expected)


def test_shared_memory():
    lazy, real, _ = pair()
    constant = lazy.detach()
    assert constant.share_memory_() is constant and constant.is_shared()
    torch.testing.assert_close(constant.logsumexp(-1), real.logsumexp(-1).detach())
    assert lazy.share_memory_().is_shared()


def test_a_python_function_in_place():
    lazy, real, _ = pair()
    constant = lazy.detach()
    assert constant.apply_(lambda x: 2 * x) is constant
    torch.testing.assert_close(constant.logsumexp(-1), (2 * real).logsumexp(-1).detach())
    with pytest.raises(RuntimeError, match="Variable that requires grad"):
        pair()[0].apply_(lambda x: x)


def test_the_other_of_type_as_gives_no_gradient(monkeypatch):
    monkeypatch.setattr(cell, "told", set())
    lazy, real, _ = pair()
    found, expected = ((x > 0).type_as(x).mean(-1) for x in (lazy, real))
    assert not found.requires_grad
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-6)
    doubled = lazy.type_as(torch.ones(2, dtype=torch.float64, requires_grad=True))
    assert doubled.dtype == torch.float64 and doubled.logsumexp(-1).dtype == torch.float64
    assert lazy.type_as(real) is lazy


def test_a_mask_of_the_type_of_logits_needs_none(monkeypatch):
    monkeypatch.setattr(cell, "told", set())
    lazy, real, _ = pair()
    for found in (MASK.type_as(lazy), MASK.type_as(other=lazy)):
        assert type(found) is torch.Tensor and torch.equal(found, MASK.type_as(real))
    assert not cell.told and lazy._cell.values is None
    assert lazy.register_hook(lambda grad: grad)  # nothing was read


@pytest.mark.parametrize("by", [0.5, torch.linspace(0.5, 1.5, T)[:, None]])
def test_few_rows_of_what_waits_are_read_alone(by, monkeypatch):
    """A text's logits fit a block; all of them, which its temperature was to divide, do not."""
    monkeypatch.setattr(cell, "told", set())
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V * T})

    def read(x):
        scaled = (x / by).clamp(-2, 2)
        return torch.stack([row.logsumexp(-1) + row.sum(-1) for row in scaled])

    lazy, real, leaves = pair()
    found, expected = (results(read, x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not cell.told and lazy._cell.values is None


def test_logits_in_16_bits_are_scaled_in_place_by_float32(size, monkeypatch):  # noqa: F811
    """A temperature of each text: the quotient is rounded to 16 bits, as torch rounds it."""
    monkeypatch.setattr(cell, "told", set())
    lazy, real, leaves = pair()
    by, found = torch.linspace(0.5, 1.5, T)[:, None].requires_grad_(), []
    for x in (lazy.bfloat16(), real.bfloat16()):
        assert x.div_(by) is x and x.dtype == torch.bfloat16
        found.append(results(lambda x: x.float().square().sum(-1), x, [*leaves, by]))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
    assert not cell.told


def scaled(x):
    return (x / torch.linspace(0.5, 1.5, T)[:, None]).softmax(-1)


UNTOLD = {
    "all_by_a_number": (B, lambda x: (x / 0.7).softmax(-1).cumsum(-1)),
    "all_by_rows": (B, lambda x: scaled(x).cumsum(-1)),
    "all_in_place": (B, lambda x: x.div_(torch.ones(T, 1)).softmax(-1).sum()),
    "a_text_compared": (1, lambda x: (scaled(x) > 0.02)[0].cumsum(-1)),
    "a_text_of_what_is_there": (1, lambda x: x.there[0].cumsum(-1)),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_logits_of_a_block_are_computed_without_a_word(name, monkeypatch):
    """All of them, or one text, which no other has to be computed for."""
    texts, read = UNTOLD[name]
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V * T * texts})
    lazy, real, _ = pair()
    for x in (lazy, real):
        x.there = scaled(x)
        if name == "a_text_of_what_is_there":
            x.there.cumsum(-1)
    monkeypatch.setattr(cell, "told", told := set())
    torch.testing.assert_close(read(lazy), read(real))
    assert not told


KEPT_LOSSES = {
    "entropy": lambda x: torch.distributions.Categorical(logits=x).entropy(),
    "sorted": lambda x: x.log_softmax(-1).sort(-1).values,
    "by_rows": lambda x: scaled(x).square().sum(-1),
    "in_place": lambda x: x.div_(0.7).softmax(-1).cumsum(-1),
    "in_place_by_rows": lambda x: x.div_(torch.ones(T, 1)).softmax(-1).cumsum(-1),
}


@pytest.mark.parametrize("name", KEPT_LOSSES)
def test_a_loss_that_is_kept_holds_nothing_after_its_backward(name):
    """As with the model's own logits, after the backward that frees the graph and not before."""
    x, real, leaves = pair()
    base = weakref.ref(x._cell.promise.base)
    loss, expected = KEPT_LOSSES[name](x).sum(), KEPT_LOSSES[name](real).sum()
    options = {"rtol": 1e-4, "atol": 1e-5}
    for retained in (True, False):
        found = (torch.autograd.grad(y, leaves, retain_graph=retained) for y in (loss, expected))
        torch.testing.assert_close(*found, **options)
        assert base() is not None
    torch.testing.assert_close(x + 0, real + 0, **options)  # still to be read
    for y in (loss, expected):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()
    del x
    gc.collect()
    assert base() is None
