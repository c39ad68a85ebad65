"""Logits that are tensors before they are numbers, and what evaluation makes of them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import numpy as np
import torch
import torch.nn.functional as F
from _tiny import one_thread  # noqa: F401
from accelerate.utils import pad_across_processes
from torch import nn

from fastpo.integrations.lazy import cell
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise

B, T, H, V = 3, 7, 16, 211


@pytest.fixture
def pair(monkeypatch):
    """A promise, and the logits it stands for."""
    monkeypatch.setattr(cell, "told", set())
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H)
    with torch.no_grad():
        return promised(Promise.of(head, hidden)), head(hidden)


WORDS = torch.arange(B * T).view(B, T, 1)
ANSWERED = {
    "argmax": lambda x: x.argmax(-1),
    "shifted": lambda x: torch.argmax(x[:, :-1], dim=-1),
    "gather": lambda x: x.log_softmax(-1).gather(-1, WORDS),
    "functional": lambda x: torch.gather(F.log_softmax(x.float() / 0.7, dim=-1), -1, WORDS),
    "topk": lambda x: torch.topk(x, 5, dim=-1).values,
    "lse": lambda x: x.detach().logsumexp(-1),
    "loss": lambda x: F.cross_entropy(x.view(-1, V), WORDS.flatten(), reduction="none"),
    "padded": lambda x: pad_across_processes(x, dim=1, pad_index=-100).argmax(-1),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_answers_without_logits(name, pair):
    promise, real = pair
    torch.testing.assert_close(ANSWERED[name](promise), ANSWERED[name](real), rtol=1e-5, atol=1e-5)
    assert not cell.told


def test_no_pointer_without_memory(pair):
    """Read through it, the capsule would end the process."""
    promise, real = pair
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(promise)
    torch.testing.assert_close(torch.from_dlpack(promise), real)


def test_facts_cost_nothing(pair):
    promise, real = pair
    for fact in ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_nested"):
        assert getattr(promise, fact) == getattr(real, fact), fact
    assert isinstance(promise, torch.Tensor) and len(promise) == B
    assert (promise.size(-1), promise.dim(), promise.numel()) == (V, 3, real.numel())
    assert not cell.told


def halved(x):
    x.div_(2)
    x[:, 1:, 5] = 3.0
    return x


NEEDED = {
    "softmax": lambda x: x.softmax(-1),
    "compared": lambda x: (x > 0) & (x == x),
    "stacked": lambda x: torch.cat((x, x[:, :2]), 1),
    "numpy": lambda x: torch.from_numpy(np.asarray(x)),
    "list": lambda x: torch.tensor(x.tolist()),
    "transposed": lambda x: x.mT,
    "elsewhere": lambda x: x.to("cpu", torch.float64),
    "in_place": halved,
    "read_after_a_change": lambda x: halved(x).argmax(-1),
    "both": lambda x: x * x,
}


@pytest.mark.parametrize("name", NEEDED)
def test_anything_else_gets_the_logits(name, pair):
    promise, real = pair
    found, expected = NEEDED[name](promise), NEEDED[name](real)
    torch.testing.assert_close(found + 0, expected + 0, rtol=1e-5, atol=1e-5)
    assert len(cell.told) >= 1
