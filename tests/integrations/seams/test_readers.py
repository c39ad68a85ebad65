"""What frameworks read of lazy logits: their own modules, else some of their shape."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import fastpo
from fastpo.integrations import readers
from fastpo.integrations.lazy.logits import promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.integrations.seams.saying import say_once

N, H, V = 9, 16, 40
OPENRLHF, AXOLOTL = "openrlhf.models.utils", "axolotl.monkeypatch.trainer.utils"
TEXTS = {
    OPENRLHF: """
def log_probs_from_logits(logits, labels, temperature=1.0):
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

def compute_entropy(logits):
    pd = logits.softmax(-1)
    return logits.logsumexp(-1) - (pd * logits).sum(-1)
""",
    AXOLOTL: """
def selective_log_softmax(logits, index):
    squeeze = index.ndim == logits.ndim - 1
    logps = logits.log_softmax(-1).gather(-1, index.unsqueeze(-1) if squeeze else index)
    return logps.squeeze(-1) if squeeze else logps

def entropy_from_logits(logits, chunk_size=128):
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)
""",
}


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    for module, text in TEXTS.items():
        package, _, rest = module.partition(".")
        if find_spec(package) is None:
            file = (tmp_path / package / rest.replace(".", "/")).with_suffix(".py")
            file.parent.mkdir(parents=True)
            file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    say_once.cache_clear()
    readers.install()
    yield
    readers.remove()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("openrlhf", "axolotl")]:
        del sys.modules[name]


def utils(module=OPENRLHF):
    return importlib.import_module(module)


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


def test_axolotls_are_read_without_logits_on_a_gpu_too(monkeypatch):
    head, hidden, labels = problem()
    logits = promised(Promise.of(head, hidden))
    for seam in readers.SEAMS[2:]:  # what a GPU would give all logits to
        monkeypatch.setattr(seam.current(), "original", None)
    entropy = utils(AXOLOTL).entropy_from_logits(logits)
    found = graded(
        utils(AXOLOTL).selective_log_softmax(logits, labels), entropy, hidden, head.weight
    )
    real = head(hidden)
    logps = real.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    expected = graded(logps, Categorical(logits=real).entropy(), hidden, head.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_several_words_of_a_row_are_axolotls_to_read():
    head, hidden, labels = problem()
    index = torch.stack((labels, labels.flip(0)), -1)
    found = utils(AXOLOTL).selective_log_softmax(promised(Promise.of(head, hidden)), index)
    torch.testing.assert_close(found, head(hidden).log_softmax(-1).gather(-1, index))
    assert utils(AXOLOTL).entropy_from_logits(head(hidden), 4).shape == (N,)


def test_another_shape_reads_all_logits(caplog, monkeypatch):
    readers.remove()
    monkeypatch.setattr(utils(), "compute_entropy", lambda logits, chunk: logits)
    readers.install()
    assert utils().compute_entropy("x", 1) == "x"
    assert "OpenRLHF reads all logits" in caplog.text


def test_the_patch_brings_it():
    pytest.importorskip("trl")
    readers.remove()
    own = utils().compute_entropy
    with fastpo.patched():
        assert utils().compute_entropy is not own
    assert utils().compute_entropy is own
