"""Where a forward draws noise, prompts are not shared, and the log says so."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("transformers")

import _architectures
import _tiny as tiny
import torch
from _refusals import fresh, llama, plain  # noqa: F401
from _tiny import one_thread  # noqa: F401
from torch import nn

from fastpo.integrations.sharing import probe
from fastpo.integrations.sharing.backbone import shared_prompts

SAID = "shares no prompts: it draws noise, as dropout does"


class Own(nn.Module):
    """A layer's own dropout."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return nn.functional.dropout(x, self.rate, self.training)


def noisy(layer):
    model = llama().model.train()
    for each in model.layers:
        each.mlp = nn.Sequential(each.mlp, layer)
    return model


def tokens():
    return plain()["attention_mask"].sum()


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, Own])
def test_every_kind_is_seen(kind, caplog):
    model = noisy(kind(0.3))
    with shared_prompts(model, always=True) as handle:
        model(**plain())
        assert handle.tokens.computed == tokens()
        assert SAID in caplog.text
        model.eval()(**plain())
        assert handle.tokens.computed < 2 * tokens()


def test_layers_in_training_under_a_backbone_that_is_not(caplog):
    model = noisy(nn.Dropout(0.3)).eval()
    model.layers[0].mlp.train()
    with shared_prompts(model, always=True) as handle:
        model(**plain())
    assert handle.tokens.computed == tokens() and SAID in caplog.text


@pytest.mark.parametrize("prefix", ["GPT2", "GPTBigCode", "Phi"])
def test_rates_of_a_config_alone_are_no_noise(prefix, caplog):
    """TRL turns dropout off in the layers, where the config's rate was copied to."""
    model = _architectures.model(prefix, {"resid_pdrop": 0.1, "attn_pdrop": 0.0}).train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    with shared_prompts(model, always=True) as handle:
        model(**plain())
    assert handle.tokens.computed < tokens() and not caplog.records


def test_it_is_asked_once_for_each_mode_and_draws_nothing(monkeypatch):
    asked, draws, after = [], probe.draws, []
    monkeypatch.setattr(probe, "draws", lambda *a: asked.append(a) or draws(*a))
    model = noisy(Own(0.3))
    torch.manual_seed(0)
    own = model(**plain()).last_hidden_state
    with shared_prompts(model, share=False, always=True):
        model(**plain())
    assert not asked  # nothing would be shared
    with shared_prompts(model, always=True):
        for _ in range(3):
            torch.manual_seed(0)
            state = torch.get_rng_state()
            model.eval()(**plain())
            assert torch.equal(torch.get_rng_state(), state)
            model.train()(**plain())
            after.append(torch.get_rng_state())
    assert len(asked) == 1 and torch.equal(after[0], after[1])
    torch.manual_seed(0)
    assert torch.equal(model(**plain()).last_hidden_state, own)


def test_noise_that_comes_later(caplog):
    """By a schedule, say: nothing of the model says so."""
    layer = Own(0.0)
    model = noisy(layer)
    with shared_prompts(model, always=True) as handle:
        model(**plain())
        layer.rate = 0.3
        model(**plain())
        handle.tokens.computed = 0
        model(**plain())
    assert handle.tokens.computed == tokens() and SAID in caplog.text


def test_noise_of_a_layer_that_comes_later(caplog):
    """In the place of one that drew none, so that all modes are what they were."""
    model = noisy(nn.Identity())
    with shared_prompts(model, always=True) as handle:
        model(**plain())
        assert handle.tokens.computed < tokens()
        handle.tokens.computed = 0
        other = Own(0.3)
        for layer in model.layers:
            layer.mlp[1] = other
        model(**plain())
    assert handle.tokens.computed == tokens() and SAID in caplog.text


class Drawing(nn.Module):
    """Draws, and uses nothing of it."""

    def forward(self, x):
        torch.rand(3)
        return x


def test_what_is_drawn_and_not_used_is_no_noise(caplog):
    model = noisy(Drawing())
    with shared_prompts(model, always=True) as handle:
        for _ in range(2):
            model(**plain())
    assert handle.tokens.computed < 2 * tokens() and not caplog.records


def test_another_thread_that_draws_is_no_noise_of_the_model(caplog):
    model, done = llama().model.train(), threading.Event()

    def draw():
        while not done.is_set():
            torch.rand(10)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        with shared_prompts(model, always=True) as handle:
            for _ in range(3):
                model(**plain())
    finally:
        done.set()
        thread.join()
    assert handle.tokens.saved > 0.3 and not caplog.records


def test_checkpoints_are_asked_without_a_warning(recwarn):
    model = tiny.model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with shared_prompts(model, always=True) as handle:
        model(**plain())
    assert handle.tokens.saved > 0.3
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]
