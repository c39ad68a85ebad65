"""Lazy logits that change, whose copies or views change, and what they are made of."""

from __future__ import annotations

import gc
import weakref

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from _tiny import one_thread  # noqa: F401
from torch import nn

from fastpo.integrations.lazy import blocks
from fastpo.integrations.lazy.logits import LazyLogits, promised
from fastpo.integrations.lazy.promise import Promise

B, T, H, V = 3, 9, 8, 31
LABELS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
ANOTHER_VIEW = "expected no change in place through another view"


@pytest.fixture(autouse=True, params=["one block", "blocks of two rows"])
def size(request, monkeypatch):
    size = 1 << 30 if request.param == "one block" else 4 * V * 2
    monkeypatch.setattr(blocks, "BYTES", {"cpu": size})


def made(lazy, dtype=torch.float32):
    """Logits and the leaves."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V).to(dtype), torch.randn(B, T, H).to(dtype).requires_grad_()
    return promised(Promise.of(head, hidden)) if lazy else head(hidden), [
        hidden,
        *head.parameters(),
    ]


def results(read, lazy, dtype=torch.float32):
    logits, leaves = made(lazy, dtype)
    found = read(logits)
    assert not isinstance(found, LazyLogits)
    grads = torch.autograd.grad(found.float().square().sum(), leaves) if found.requires_grad else ()
    return [found.detach(), *grads]


def compare(read, dtype=torch.float32):
    slack = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(
        results(read, True, dtype), results(read, False, dtype), check_dtype=False, **slack
    )


# Facts of memory


def as_a_loss_flattens(x):
    shifted = x[:, :-1]
    if not shifted.is_contiguous():
        shifted = shifted.contiguous()
    return F.cross_entropy(shifted.view(-1, V), LABELS[:, 1:].flatten())


def a_copy_lies_close(x):
    return (x[:, :-1] / 0.7).view(-1, V).logsumexp(-1) + x[:, :-1].log_softmax(-1).view(-1, V)[:, 3]


@pytest.mark.parametrize("read", [as_a_loss_flattens, a_copy_lies_close])
def test_views_and_copies_lie_in_memory_as_the_model_s(read):
    compare(read)


VIEWS = [
    lambda x: x,
    lambda x: x[:, :-1],
    lambda x: x[:, 1::2],
    lambda x: x[1],
    lambda x: x[:, -1],
    lambda x: x[:, 1:].contiguous(),
    lambda x: x[:, 1:] * 2,
    lambda x: x[:, 1:].softmax(-1),
    lambda x: x.transpose(1, 2),
    lambda x: torch.stack([x, x]),
]


@pytest.mark.parametrize("view", VIEWS)
def test_strides_are_those_of_the_model_s(view):
    found, expected = (view(made(lazy)[0]) for lazy in (True, False))
    assert found.stride() == expected.stride() and found.stride(0) == expected.stride(0)
    assert found.is_contiguous() == expected.is_contiguous()
    assert found.storage_offset() == expected.storage_offset()


# Numbers beside logits, and the head


def centred(x):
    center = torch.zeros(V)
    p = ((x - center) / 0.5).softmax(-1)
    loss = p.square().sum(-1)
    center.add_(torch.linspace(0, 9, V))
    return loss


@torch.no_grad()  # the model's own autograd would tell
def tempered(x):
    temperature = torch.tensor(2.0)
    scaled = (x / temperature).exp()
    temperature.fill_(0.5)
    return scaled.sum(-1)


@torch.no_grad()
def masked(x):
    mask = torch.arange(V) % 3 == 0
    kept = x.masked_fill(mask, -9.0).exp()
    mask.logical_not_()
    return kept.sum(-1)


@pytest.mark.parametrize("read", [centred, tempered, masked])
def test_numbers_are_those_that_were_given(read):
    compare(read)


def picked(x, numbers):
    return torch.sigmoid(x).gather(-1, numbers["ids"][..., None]).sum()


def weighed(x, numbers):
    return F.cross_entropy(x.view(-1, V), numbers["ids"].flatten(), weight=numbers["weights"])


@pytest.mark.parametrize("read", [picked, weighed])
def test_a_backward_by_blocks_reads_the_numbers_that_were_given(read, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V * 2})
    grads = []
    for lazy in (True, False):
        logits, leaves = made(lazy)
        numbers = {"ids": LABELS.clone(), "weights": torch.linspace(0.5, 2.0, V)}
        loss = read(logits, numbers)
        if lazy:  # of the model's own autograd would tell
            numbers["ids"].zero_()
            numbers["weights"].zero_()
        grads.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_logits_are_read_before_the_head_is_another(name):
    logits, (_, weight, bias) = made(True)
    x = weight if name == "weight" else bias
    x.data = x.data * 2
    with pytest.raises(RuntimeError, match=f"expected to be read before lm_head.{name} changes"):
        logits.logsumexp(-1)


READ_WITH_GRADIENT = {
    "logps": lambda x: x.log_softmax(-1).gather(-1, LABELS[..., None]),
    "probabilities": lambda x: x.softmax(-1).max(-1).values,
    "all": lambda x: x.cumsum(-1),
    "scaled": lambda x: x.div_(2).softmax(-1).square(),
    "scaled_by_rows": lambda x: x.mul_(torch.ones(B, T, 1)).softmax(-1).square(),
    "words": lambda x: x[..., 3:9],
    "changed": lambda x: x[:, 1:].clamp_(min=0),
}


@pytest.mark.parametrize("name", READ_WITH_GRADIENT)
def test_nothing_waits_for_the_garbage_collector(name):
    logits, _ = made(True)
    seen = [weakref.ref(x) for x in (logits, logits._cell, logits._cell.promise.base)]
    gc.disable()
    try:
        READ_WITH_GRADIENT[name](logits).sum().backward()
        del logits
        assert [x() for x in seen] == [None, None, None]
    finally:
        gc.enable()


# Copies


def temperature_of_one(x):
    scaled = x / 1.0
    scaled[:, 0] = 0
    return scaled.logsumexp(-1) + x.logsumexp(-1)


def two_temperatures(x):
    one, other = x / 2, x / 2
    one.clamp_(min=-1)
    return one.logsumexp(-1) + other.logsumexp(-1)


def two_log_softmaxes(x):
    with torch.no_grad():
        one = x.log_softmax(-1)
        one[:, 0] = 0
        return one.sum() + x.log_softmax(-1).square().sum()


def two_of_another_dtype(x):
    one = x.float()
    one /= 1.3
    return one.logsumexp(-1) + x.float().logsumexp(-1)


COPIES = [
    (temperature_of_one, torch.float32),
    (two_temperatures, torch.float32),
    (two_log_softmaxes, torch.float32),
    (two_of_another_dtype, torch.bfloat16),
]


@pytest.mark.parametrize(("read", "dtype"), COPIES)
def test_a_copy_may_change(read, dtype):
    compare(read, dtype)


# Views that change


def penalty(x):
    x[..., 7] -= 5
    return x.logsumexp(-1)


def penalty_of_a_copy(x):
    scaled = x / 0.7
    scaled[..., 7] -= 5
    scaled[..., 3:5] *= 2
    return scaled.logsumexp(-1) + x.logsumexp(-1)


def prefix(x):
    x[:, :, :3] += 1.5
    return x.softmax(-1).square().sum(-1)


def row(x):
    x[0] *= 0.5
    return x.logsumexp(-1)


def last(x):
    x[:, -1] += 1
    x[:, -1] /= 2
    return x.log_softmax(-1)[..., 3]


def one_after_the_other(x):
    x[0] *= 0.5
    x[..., 3] += 1
    x[:, 2] -= 1
    return x.logsumexp(-1)


def own_weights_of_a_row(x):
    x[:, 0] *= torch.linspace(1, 2, B)[:, None]
    return x.logsumexp(-1)


def a_copy_of_probabilities(x):
    p = x.softmax(-1).clone()
    p[..., 0] *= 0
    p[1] *= 2
    return p.sum(-1).log()


def without_gradient(read):
    def quietly(x):
        with torch.no_grad():
            found = read(x)
        return found + x.square().sum(-1)

    return quietly


SET_BACK = [penalty, penalty_of_a_copy, prefix, row, last, one_after_the_other]
SET_BACK += [own_weights_of_a_row, a_copy_of_probabilities]
SET_BACK += [without_gradient(penalty), without_gradient(row), without_gradient(last)]


@pytest.mark.parametrize("read", SET_BACK)
def test_python_sets_what_it_has_changed(read):
    compare(read)


def test_other_rows_that_were_changed_are_not_taken_back():
    logits, _ = made(True)
    part = logits[0]
    part *= 0.5
    with pytest.raises(RuntimeError, match=ANOTHER_VIEW):
        logits[1] = part


@pytest.mark.parametrize("by", [0.5, torch.linspace(1, 2, T)[:, None]])
def test_rows_that_were_taken_back_are_not_read(by):
    logits, _ = made(True)
    part = logits[0]
    part *= by
    logits[0] = part
    with pytest.raises(RuntimeError, match=ANOTHER_VIEW):
        part.sum()


def test_a_view_of_before_python_s_set_is_not_read():
    logits, _ = made(True)
    part = logits[:, 1:]
    logits[:, -1] += 1
    with pytest.raises(RuntimeError, match=ANOTHER_VIEW):
        part.logsumexp(-1)


def through_a_view_of_a_view(x):
    with torch.no_grad():
        x[:, -1][:, 7:9].fill_(-50.0)


def through_words_of_a_view(x):
    x[:, :-1][..., 7].zero_()


def through_a_view_that_lives(x):
    x.kept = x[:, :-1][..., 7]
    x.kept.zero_()


def through_its_words(x):
    x.part = x[:, 1:]
    x[..., 7].zero_()
    return x.part


LOST = [through_a_view_of_a_view, through_words_of_a_view, through_a_view_that_lives]
LOST += [through_its_words]


@pytest.mark.parametrize("change", LOST)
@pytest.mark.parametrize("read", [lambda x: x.sum(), lambda x: x[:, -1].softmax(-1)])
def test_no_change_through_values_is_lost(change, read):
    logits, _ = made(True)
    stale = change(logits)
    with pytest.raises(RuntimeError, match=ANOTHER_VIEW):
        read(logits if stale is None else stale)


def test_values_that_nobody_has_are_not_watched():
    logits, _ = made(True)
    for i in range(T):
        logits[:, i].cumsum(-1)
    assert len(logits._cell.promise.family.watches) <= 1


def test_numpy_writes_into_the_logits():
    def read(x):
        x = x.detach()
        x.numpy()[..., 3] = 9
        return x.logsumexp(-1)

    compare(read)


def test_turned_logits_change_alone_with_theirs():
    def kept(x):
        before = x + 0
        x.transpose(1, 2)[...] = 0.25
        return before.cumsum(-1)

    def kept_without_gradient(x):
        with torch.no_grad():
            return kept(x)

    compare(kept)
    compare(kept_without_gradient)


def test_what_autograd_saved_of_the_logits_does_not_change():
    for lazy in (True, False):
        logits, _ = made(lazy)
        loss = logits.exp().cumsum(-1).sum() + logits.square().cumsum(-1).sum()
        logits.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
