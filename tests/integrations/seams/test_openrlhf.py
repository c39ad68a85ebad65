"""What OpenRLHF reads of lazy logits: its own module where it is there, else one of its shape."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import fastpo
from fastpo.integrations import openrlhf
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.integrations.seams.saying import say_once

N, H, V = 9, 16, 40
UTILS = """
import torch

def log_probs_from_logits(logits, labels, temperature=1.0):
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

def compute_entropy(logits):
    pd = torch.nn.functional.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(pd * logits, dim=-1)
"""


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    if find_spec("openrlhf") is None:
        file = tmp_path / "openrlhf" / "models" / "utils.py"
        file.parent.mkdir(parents=True)
        file.write_text(UTILS)
        monkeypatch.syspath_prepend(tmp_path)
    say_once.cache_clear()
    openrlhf.install()
    yield
    openrlhf.remove()
    for name in [name for name in sys.modules if name.partition(".")[0] == "openrlhf"]:
        del sys.modules[name]


def utils():
    return importlib.import_module("openrlhf.models.utils")


def problem():
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V), torch.randn(N, H, requires_grad=True)
    return head, hidden, torch.randint(0, V, (N,))


def graded(logps, entropy, *leaves):
    return [logps, entropy, *torch.autograd.grad((2 * logps + entropy).sum(), leaves)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropies_are_read_without_logits(temperature):
    head, hidden, labels = problem()
    logits = promised(Promise.of(head, hidden))
    entropy = utils().compute_entropy(logits)
    logps = utils().log_probs_from_logits(logits, labels, temperature)
    found = graded(logps, entropy, hidden, head.weight)
    assert logits._cell.values is None
    real = head(hidden)
    all_logps = (real / temperature).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    expected = graded(all_logps, Categorical(logits=real).entropy(), hidden, head.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_another_shape_reads_all_logits(caplog, monkeypatch):
    openrlhf.remove()
    monkeypatch.setattr(utils(), "compute_entropy", lambda logits, chunk: logits)
    openrlhf.install()
    assert utils().compute_entropy("x", 1) == "x"
    assert "OpenRLHF reads all logits" in caplog.text


def test_the_patch_brings_it():
    pytest.importorskip("trl")
    openrlhf.remove()
    own = utils().compute_entropy
    with fastpo.patched():
        assert utils().compute_entropy is not own
    assert utils().compute_entropy is own
