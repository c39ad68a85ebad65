"""`fastpo.attach(model, shared_prompts=True)`: neither logits nor a prompt twice."""

from __future__ import annotations

import copy

import _tiny as tiny
import pytest

pytest.importorskip("transformers")

import _batches
import torch
from _batches import scored
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.sharing import attention, backbone


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Prompts of these tests are short: anything is worth it."""
    monkeypatch.setattr(backbone, "_LEAST", 1)
    monkeypatch.setattr(backbone, "is_worth", lambda *_: True)
    yield
    attention.restore()


def inputs():
    ids, mask = _batches.both()
    return {"input_ids": ids, "attention_mask": mask, "labels": scored(ids, mask)}


def step(model):
    out = model(**inputs())
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "mixtral"])
def test_loss_logps_and_gradients(name):
    model = tiny.model(name)
    with fastpo.attach(model):
        expected, grads = step(model)
    model = tiny.model(name)
    with fastpo.attach(model, shared_prompts=True) as attached:
        found, own = step(model)
        assert attached.sharing.tokens.saved > 0.3
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.logps, expected.logps, rtol=1e-4, atol=1e-4)
    for key, grad in grads.items():
        assert (own[key] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, key


def test_a_repeated_token_counts_as_often_as_it_stood_for_routers():
    """In the balance of experts, and not less because it is computed once."""
    losses = []
    for shared in (False, True):
        model = tiny.model("mixtral")
        with fastpo.attach(model, shared_prompts=shared):
            out = model(**inputs())
            out.aux_loss.backward()
        gates = [p.grad for name, p in model.named_parameters() if name.endswith("gate.weight")]
        losses.append((out.aux_loss.detach(), gates))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)
    assert all(gate.any() for gate in losses[0][1])


def test_detach_gives_both_back():
    model = tiny.model()
    attached = fastpo.attach(model, shared_prompts=True)
    assert "forward" in vars(model) and "forward" in vars(model.model)
    model(**inputs())
    attached.detach()
    assert "forward" not in vars(model) and "forward" not in vars(model.model)
    assert "logps" not in model(**inputs())
    with fastpo.attach(model, shared_prompts=True) as attached:  # and again
        model(**inputs())
        assert attached.sharing.tokens.saved > 0.3


def test_a_copy_shares_for_itself():
    model = tiny.model()
    attached = fastpo.attach(model, shared_prompts=True)
    twin = copy.deepcopy(model)
    attached.detach()
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(2)
        model.model.embed_tokens.weight.mul_(2)
        found, expected = twin(**inputs()), model(**inputs())
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    assert attached.sharing.tokens.padded == 0
    assert vars(twin)["_fastpo"].sharing.tokens.saved > 0.3


def test_one_handle_at_a_time():
    model = tiny.model()
    with fastpo.shared_prompts(model):
        with pytest.raises(ValueError, match="model: expected one without shared prompts"):
            fastpo.attach(model, shared_prompts=True)
        assert "forward" not in vars(model)


def test_replicas_of_data_parallel_run_padded():
    """They hold what the original holds, whose forward would run the original's weights."""
    model = tiny.model()
    with fastpo.shared_prompts(model) as handle:
        replica = model.model._replicate_for_data_parallel()
        assert "forward" not in vars(replica)
        assert "forward" in vars(model.model)
        replica._parameters = {}
        handle.detach()
    assert not {"forward", "_replicate_for_data_parallel"} & set(vars(model.model))
