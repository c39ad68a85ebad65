"""Lazy logits with real tensors of their shape: soft labels, a teacher's probabilities, masks."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from _pairs import B, T, V, nothing_told, pair, results, size  # noqa: F401
from _probes import Widest
from _tiny import one_thread  # noqa: F401
from torch import nn
from torch.distributions import Categorical

from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.testing import assert_as_good_as_eager

GENERATOR = torch.Generator().manual_seed(1)
LABELS = torch.randint(0, V, (B, T), generator=GENERATOR)
SOFT = torch.rand(B, T, V, generator=GENERATOR).softmax(-1)
TURNED = SOFT.transpose(1, 2).contiguous().transpose(1, 2)
ALLOWED = torch.rand(B, T, V, generator=GENERATOR) < 0.5
ONE_HOT = F.one_hot(LABELS, V)


def trained(x):
    q = SOFT.clone().requires_grad_()
    (x.log_softmax(-1) * q).sum(-1).sum().backward(retain_graph=True)
    assert torch.allclose(q.grad, x.detach().log_softmax(-1) + 0, atol=1e-5)
    return (x.log_softmax(-1) * q).sum(-1)


def filled(x):
    x.masked_fill_(ALLOWED, -9.0)
    return x.logsumexp(-1)


def rows(x):
    return x.reshape(-1, V)


READ = {
    "one_hot": lambda x: (x.log_softmax(-1) * ONE_HOT).sum(-1),
    "brier": lambda x: (x.softmax(-1) - ONE_HOT.float()).square().sum(-1),
    "cross_entropy": lambda x: F.cross_entropy(rows(x), rows(SOFT)),
    "cross_entropy_each": lambda x: F.cross_entropy(rows(x), rows(SOFT), reduction="none"),
    "cross_entropy_summed": lambda x: F.cross_entropy(rows(x), rows(TURNED), reduction="sum"),
    "cross_entropy_of_two": lambda x: F.cross_entropy(rows(x), rows((2 * x).softmax(-1))),
    "of_real_logits": lambda x: F.cross_entropy(rows(SOFT), rows(x.softmax(-1))),
    "kl_div": lambda x: F.kl_div(x[:, :-1].log_softmax(-1), SOFT[:, 1:], reduction="batchmean"),
    "turned": lambda x: (x.log_softmax(-1) * TURNED).sum(-1),
    "of_every_text": lambda x: (x.log_softmax(-1) * SOFT[0]).sum(-1),
    "of_every_token": lambda x: (x.log_softmax(-1) * SOFT[:, :1]).sum(-1),
    "of_some_rows": lambda x: (x.log_softmax(-1) * SOFT)[LABELS > 9].sum(-1),
    "of_one_row": lambda x: (x[0, 0].softmax(-1) - SOFT[0, 0]).abs().sum(-1, keepdim=True),
    "of_no_rows": lambda x: (x[:0].softmax(-1) - SOFT[:0]).abs().sum(-1) + 0 * x.logsumexp(-1)[:0],
    "masked": lambda x: x.masked_fill(~ALLOWED, -1e9).logsumexp(-1),
    "where": lambda x: torch.where(ALLOWED, x, -3.0).softmax(-1).square().sum(-1),
    "filled": filled,
    "noise": lambda x: (x + SOFT).max(-1).values,
    "twice_scaled": lambda x: (0.5 * (x.log_softmax(-1) * SOFT)).sum(-1),
    "trained": trained,
    "learned_bias": lambda x: (x + torch.zeros(V, requires_grad=True)).logsumexp(-1),
    "to": lambda x: SOFT.double().to(x).sum(-1) + x.logsumexp(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_values_and_gradients(name):
    lazy, real, leaves = pair()
    found, expected = (results(READ[name], x, leaves) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [torch.div, torch.Tensor.div_])
def test_a_learned_temperature_without_dimensions(change, dtype):
    """It decides no dtype."""
    found = []
    for x in pair(dtype)[:2]:
        by = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        scaled = change(x, by)
        assert scaled.dtype == dtype
        read = scaled.logsumexp(-1), scaled[:, :0].logsumexp(-1), (scaled * by).square().mean(-1)
        read = [x.double() for x in read]
        found.append((read, torch.autograd.grad(sum(x.sum() for x in read), by)))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*found, rtol=50 * eps, atol=10 * eps)
    assert not cell.told


AROUND_A_SUM = {
    "entropy": lambda x: Categorical(logits=x).entropy(),
    "collision": lambda x: (2 * (x - x.logsumexp(-1, keepdim=True))).exp().sum(-1),
    "greatest": lambda x: x.amax(-1) - x.logsumexp(-1),
    "distance": lambda x: x.topk(3).values.sum(-1) - 3 * x.gather(-1, LABELS[..., None])[..., 0],
}


@pytest.mark.parametrize("name", AROUND_A_SUM)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_float32_of_16_bits_fits_what_walks_compute(name, dtype, mixed):
    """Logits of 60 in bfloat16 are off by 1/8, and their log-sum-exp of float32 products is not."""
    torch.manual_seed(0)
    head = nn.Linear(16, V).to(torch.float32 if mixed else dtype)
    hidden = (torch.randn(B, T, 16) * 30).to(dtype).requires_grad_()
    leaves = [hidden, *head.parameters()]
    with torch.autocast("cpu", dtype, enabled=mixed):
        both = promised(Promise.of(head, hidden)), head(hidden)
    ours, eager = (results(AROUND_A_SUM[name], x.float(), leaves) for x in both)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = results(AROUND_A_SUM[name], F.linear(*exact), exact)
    for which, (x, other, true) in enumerate(zip(ours, eager, truth, strict=True)):
        slack = 0 if which else 1e-4  # a difference of numbers of 60
        assert_as_good_as_eager(f"{name} {which}", x, other, true, slack=slack)


class WidestCopy(Widest):
    def counts(self, x):
        own = {y.untyped_storage().data_ptr() for y in (SOFT, ONE_HOT, TURNED)}
        return x.untyped_storage().data_ptr() not in own


@pytest.mark.parametrize("name", ["one_hot", "cross_entropy", "kl_div", "turned", "of_every_text"])
def test_they_are_not_copied(name, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V})
    lazy, _, leaves = pair()
    with WidestCopy() as made:
        results(READ[name], lazy, leaves)
    assert made.elements < B * (T - 1) * V and not cell.told


def test_a_change_before_they_are_read_is_an_error(monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V})
    lazy, soft = pair()[0], SOFT.clone()
    each = lazy.log_softmax(-1) * soft
    read = each.sum(-1)
    soft.zero_()
    with pytest.raises(RuntimeError, match="mul: expected its operands to stay as they are"):
        each.sum(-1)
    with pytest.raises(RuntimeError, match="mul: expected its operands to stay as they are"):
        read.sum().backward()


def test_inference_tensors_may_change(monkeypatch):
    """They do not tell when they do."""
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V})
    lazy, real, _ = pair()
    with torch.inference_mode():
        soft = SOFT.clone()
        each = lazy.detach() * soft
        soft.zero_()
        torch.testing.assert_close(each.sum(-1), (real * SOFT).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", [None, [1, 2]])
def test_what_is_no_tensor_is_torch_s_error(target):
    for x in pair()[:2]:
        with pytest.raises(TypeError, match="'target'"):
            F.cross_entropy(rows(x), target)
