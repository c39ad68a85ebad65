"""`LazyLogits` answers as the logits would, without them."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from _tiny import one_thread  # noqa: F401
from torch import nn

from fastpo.integrations.lazy import cell, promise
from fastpo.integrations.lazy.logits import promise_of, promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.ops.walks import picked

B, T, H, V = 3, 7, 16, 211


@pytest.fixture(params=["plain", "bias", "scaled", "capped"])
def logits(request):
    """Lazy logits, the real ones in the same graph, and the leaves."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=request.param == "bias")
    hidden = torch.randn(B, T, H, requires_grad=True)
    lazy, real = promised(Promise.of(head, hidden)), head(hidden)
    if request.param == "scaled":
        lazy, real = 2.5 * lazy / 0.5, 2.5 * real / 0.5
    if request.param == "capped":
        lazy, real = torch.tanh(lazy / 3.0) * 3.0, torch.tanh(real / 3.0) * 3.0
    return lazy, real, [hidden, *head.parameters()]


@pytest.fixture
def labels():
    torch.manual_seed(1)
    ids = torch.randint(0, V, (B, T))
    return ids.masked_fill(torch.rand(B, T) < 0.4, -100)


@pytest.fixture
def told(caplog, monkeypatch):
    """Names of the operations that computed full logits."""
    monkeypatch.setattr(cell, "told", set())
    caplog.set_level(logging.WARNING, logger="fastpo")
    return lambda: {name for name, _ in cell.told}


def smoothed(logits, labels):
    """transformers' LabelSmoother."""
    log_probs = -F.log_softmax(logits[..., :-1, :].contiguous(), dim=-1)
    target = labels[..., 1:].unsqueeze(-1)
    padding = target.eq(-100)
    nll = log_probs.gather(dim=-1, index=target.clamp(min=0)).masked_fill(padding, 0.0)
    flat = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32).masked_fill(padding, 0.0)
    return nll.sum() + 0.1 * flat.sum() / V


FEW = torch.randint(0, V, (B, T, 4), generator=torch.Generator().manual_seed(2))
READINGS = {
    "cross_entropy": lambda x, y: F.cross_entropy(x.view(-1, x.shape[-1]), y.view(-1)),
    "named": lambda x, y: F.cross_entropy(input=x.view(-1, V), target=y.view(-1)),
    "module": lambda x, y: nn.CrossEntropyLoss()(x.reshape(-1, V), y.reshape(-1)),
    "reductions": lambda x, y: sum(
        F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction=how).sum()
        for how in ("none", "sum")
    ),
    "smoothed": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), label_smoothing=0.2),
    "label_smoother": smoothed,
    "gather": lambda x, y: (
        x[:, :-1].log_softmax(-1).gather(-1, y[:, 1:, None].clamp(min=0)).squeeze(-1).sum()
    ),
    "take_along_dim": lambda x, y: torch.take_along_dim(
        x.log_softmax(dim=-1), y.clamp(min=0).unsqueeze(-1), dim=2
    ).sum(),
    "unbound": lambda x, y: sum(row.logsumexp(-1).sum() for row in x.unbind(0)),
    "reshaped": lambda x, y: (
        x.reshape(B * T, -1).index_select(0, torch.arange(5)).logsumexp(1).sum()
    ),
    "split": lambda x, y: x.split(split_size=2, dim=1)[1].float().contiguous().logsumexp(-1).sum(),
    "masked_rows": lambda x, y: F.cross_entropy(x[y != -100], y[y != -100]),
    "chunks": lambda x, y: F.cross_entropy(
        x[..., 1:, :].chunk(3, dim=0)[1].flatten(0, 1), y[1, 1:], reduction="sum"
    ),
    "few_words": lambda x, y: sum(
        (z.gather(-1, FEW) * FEW).sum() for z in (x, torch.log_softmax(x, dim=-1))
    ),
    "topk": lambda x, y: (torch.topk(x, k=5, dim=-1).values * torch.arange(5)).sum(),
    "logsumexp": lambda x, y: torch.stack([torch.logsumexp(row, dim=-1) for row in x]).sum(),
    "mean": lambda x, y: x[:2, :-1, :].float().mean(),
    "sum": lambda x, y: x[1:].sum() * 0.01 + (x.sum(-1) * 0.01).square().sum(),
    "row_means": lambda x, y: x[y != -100].mean(-1).sum(),
}


@pytest.mark.parametrize("name", READINGS)
def test_readings_and_their_gradients(name, logits, labels, told):
    lazy, real, leaves = logits
    read = READINGS[name]
    found, expected = read(lazy, labels), read(real, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found, leaves, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, allow_unused=True)
    for mine, own in zip(ours, theirs, strict=True):
        own = torch.zeros_like(leaves[0]) if own is None else own
        mine = torch.zeros_like(own) if mine is None else mine
        slack = 1e-5 * max(1.0, own.abs().max().item())
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=slack)
    assert not told()


def test_argmax_and_entropy(logits, labels):
    lazy, real, _ = logits
    assert torch.equal(lazy[:2].argmax(dim=-1), real[:2].argmax(dim=-1))
    assert torch.equal(lazy.topk(4).indices, real.topk(4).indices)
    stats = promise_of(lazy).stats(labels.clamp(min=0), "entropy")
    expected = torch.distributions.Categorical(logits=real).entropy()
    torch.testing.assert_close(stats.entropy, expected, rtol=1e-4, atol=1e-5)


def test_known_log_probabilities_are_not_computed_again(logits, labels, monkeypatch):
    lazy, real, _ = logits
    asked = []

    def counted(hidden, *args, **kwargs):
        asked.append(len(hidden))
        return score(hidden, *args, **kwargs)

    score = promise.score
    monkeypatch.setattr(promise, "score", counted)
    scored = labels != -100
    F.cross_entropy(lazy[:2].flatten(0, 1), labels[:2].flatten())
    kept = promise_of(lazy).only(scored)
    found = kept.logps(labels)
    kept.logps(labels)
    assert asked == [int(scored[:2].sum()), int(scored[2].sum())]
    expected = real.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(found, expected.masked_fill(~scored, 0), rtol=1e-5, atol=1e-5)


def test_other_logits_and_other_modes_are_computed_anew(logits):
    lazy, real, leaves = logits
    labels = torch.ones(B, T, dtype=torch.int64)
    with torch.no_grad():
        promise_of(lazy).logps(labels)
    half = promise_of(lazy / 2).logps(labels)
    torch.testing.assert_close(half, (real / 2).log_softmax(-1)[..., 1], rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(promise_of(lazy).logps(labels).sum(), leaves)[0].abs().sum() > 0
    constant = promise_of(lazy.detach()).logps(labels)
    assert not constant.requires_grad


UNKNOWN = {
    "getitem": lambda x: x[..., 3],
    "softmax": lambda x: torch.softmax(x, -1),
    "method": lambda x: x.exp(),
    "tensor": lambda x: x * torch.tensor(2.0),
    "batch_mean": lambda x: x.mean(0),
    "class_weights": lambda x: F.cross_entropy(
        x.flatten(0, 1), torch.ones(B * T, dtype=torch.int64), weight=torch.ones(V)
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_anything_else_gets_the_logits(name, logits):
    lazy, real, _ = logits
    torch.testing.assert_close(UNKNOWN[name](lazy), UNKNOWN[name](real), rtol=1e-5, atol=1e-5)


def test_it_says_so_once(logits, told, caplog):
    lazy = logits[0]
    for _ in range(2):
        lazy.cumsum(-1)
        torch.cumprod(lazy, -1)
    assert told() == {"cumsum", "cumprod"}
    assert len(caplog.records) == 2


def test_shapes_and_dtypes(logits):
    lazy, real, _ = logits
    assert (lazy.shape, lazy.ndim, len(lazy), lazy.numel()) == (
        real.shape,
        real.ndim,
        len(real),
        real.numel(),
    )
    assert lazy.size(-1) == V and lazy.dim() == 3 and lazy.device == real.device
    assert lazy[:, None, 1:3].shape == real[:, None, 1:3].shape
    assert lazy.to(torch.bfloat16).dtype == torch.bfloat16
    assert [part.shape for part in lazy.split(2)] == [part.shape for part in real.split(2)]
    with pytest.raises(ValueError, match=r"labels: expected shape \(3, 7\), got \(3, 1\)"):
        promise_of(lazy).logps(torch.zeros(B, 1, dtype=torch.int64))


def test_picked_products():
    """Words that repeat, and gradients into both."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    ids = torch.randint(0, 5, (10, 3))
    found = picked.picked_products(hidden, weight, ids)
    expected = (hidden.unsqueeze(1) * weight[ids]).sum(-1)
    torch.testing.assert_close(found, expected)
    g = torch.randn(10, 3)
    ours = torch.autograd.grad(found, [hidden, weight], g)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, [hidden, weight], g))
