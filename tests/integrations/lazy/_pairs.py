"""Lazy logits beside the real ones of the same head, as one block and in blocks of two rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise

B, T, H, V = 3, 7, 8, 53


@pytest.fixture(autouse=True, params=["one block", "blocks of two rows"])
def size(request, monkeypatch):
    size = 1 << 30 if request.param == "one block" else 4 * V * 2
    monkeypatch.setattr(blocks, "BYTES", {"cpu": size})


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    """What the log says once is said anew in each test."""
    monkeypatch.setattr(cell, "told", set())


def pair(dtype=torch.float32):
    """Lazy logits, the real ones of the same head, and the leaves."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V).to(dtype), torch.randn(B, T, H).to(dtype).requires_grad_()
    return promised(Promise.of(head, hidden)), head(hidden), [hidden, *head.parameters()]


def results(read, logits, leaves):
    found = read(logits)
    return [found.detach() + 0, *torch.autograd.grad(found.sum(), leaves)]
