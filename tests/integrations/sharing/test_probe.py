"""What the probe of a model sees, what it leaves as it was, and when it is asked again."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("transformers")

import _architectures
import _batches
import torch
from _refusals import fresh, llama, plain  # noqa: F401
from _tiny import one_thread  # noqa: F401
from torch import nn
from transformers import LlamaModel

from fastpo.integrations.sharing import backbone, probe
from fastpo.integrations.sharing.backbone import shared_prompts


def hidden(model, shared=True):
    """Of the tokens, and what was saved."""
    call = plain()
    with shared_prompts(model, always=True) if shared else contextlib.nullcontext() as handle:
        found = model(**call).last_hidden_state[call["attention_mask"] != 0]
    return found, shared and handle.tokens.saved


class Merging(nn.Linear):
    """As loralib's, whose weights are merged by `eval()` and parted by `train()`."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


def test_modes_are_left_without_a_word_to_the_layers():
    model = llama().model
    model.layers[0].mlp.down_proj = Merging(48, 32, bias=False)
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert hidden(model)[1] > 0.3
    assert [module.training for module in model.modules()] == modes
    assert not model.layers[0].mlp.down_proj.merged


class Convolved(nn.Module):
    """Looks along the row by weights that are zero until the first step."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.conv = mlp, nn.Conv1d(32, 32, 3, padding=2)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x):
        along = self.conv(x.transpose(1, 2))[..., : x.shape[1]]
        return self.mlp(x) + along.transpose(1, 2)


class Shifting(nn.Module):
    """Looks along the row in training alone."""

    def forward(self, x):
        return x + x.roll(1, 1) if self.training else x


@pytest.mark.parametrize("layer", [Shifting(), nn.Sequential(Shifting(), nn.Dropout(0.0))])
def test_a_layer_that_mixes_tokens_in_training_alone(layer, caplog):
    model = llama().model
    model.layers[1].mlp = nn.Sequential(model.layers[1].mlp, layer)
    with shared_prompts(model, always=True) as handle:
        model.eval()(**plain())
        assert handle.tokens.saved > 0.3
        saved = handle.tokens.computed
        model.train()(**plain())
    assert handle.tokens.computed == saved + plain()["input_ids"].numel()
    assert "off when packed" in caplog.text


class Balanced(LlamaModel):
    """Gives back a loss over all tokens, as a backbone with a router of its own may."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output["aux_loss"] = output.last_hidden_state.pow(2).mean()
        return output


class Routed(LlamaModel):
    """Gives back where each token went."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output["expert"] = output.last_hidden_state.argmax(-1)
        return output


class Gated(LlamaModel):
    """Gives back numbers of every layer."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output["gates"] = (output.last_hidden_state.sigmoid(),) * 2
        return output


@pytest.mark.parametrize(
    ("kind", "name"), [(Balanced, "aux_loss"), (Routed, "expert"), (Gated, "gates")]
)
def test_an_output_of_its_own(kind, name, caplog):
    model = llama().model
    model.__class__ = kind
    expected = model(**plain())[name]
    with shared_prompts(model, always=True):
        torch.testing.assert_close(model(**plain())[name], expected, rtol=0, atol=0)
    assert f"an output of its own, {name}" in caplog.text


class Normed(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.norm = mlp, nn.BatchNorm1d(32)

    def forward(self, x):
        return self.norm(self.mlp(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("options", [{}, {"share": False}])
def test_statistics_over_a_batch(options, caplog):
    """As the padded batch's, and no probe is among them."""
    found = []
    for shared in (False, True):
        model = llama().model.train()
        model.layers[1].mlp = Normed(model.layers[1].mlp)
        with shared_prompts(model, always=True, **options) if shared else contextlib.nullcontext():
            hidden = model(**plain()).last_hidden_state
        found.append((hidden, *model.layers[1].mlp.norm.buffers()))
    assert all(map(torch.equal, *found))
    assert "statistics over a batch" in caplog.text


def test_what_zeros_hide(caplog):
    model = llama().model
    model.layers[1].mlp = Convolved(model.layers[1].mlp)
    weight = model.layers[1].mlp.conv.weight
    at = weight.data_ptr()
    assert hidden(model)[1] == 0
    assert "off when packed" in caplog.text
    assert weight.data_ptr() == at and not weight.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_that_begin_at_zero_are_shared_and_stay_zero(autocast):
    """Also what autocast keeps of weights: as they are, and with their gradient."""
    peft = pytest.importorskip("peft")
    found = []
    for shared in (False, True):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(llama(), config).train()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            shared_prompts(model, always=True) if shared else contextlib.nullcontext() as handle,
        ):
            call = plain()
            model(**call, labels=_batches.scored(*call.values())).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert handle.tokens.saved > 0.3
    largest = max(grad.abs().max() for grad in found[0])
    for ours, own in zip(*found, strict=True):
        assert (ours - own).abs().max() <= (2e-2 if autocast else 1e-5) * largest


class Mixed(nn.Module):
    """With a little of the row's mean."""

    def __init__(self, mlp, part):
        super().__init__()
        self.mlp, self.part = mlp, part

    def forward(self, x):
        y = self.mlp(x)
        return y + self.part * y.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("dtype", "part"),
    [(torch.float64, 0.01), (torch.float32, 0.01), (torch.bfloat16, 0.03), (torch.float16, 0.01)],
)
def test_little_is_mixed_in(dtype, part, caplog):
    def model(part):
        made = llama().model.to(dtype)
        for layer in made.layers:
            layer.mlp = Mixed(layer.mlp, part)
        return made

    assert hidden(model(0.0))[1] > 0.3
    assert hidden(model(part))[1] == 0
    assert "off when packed" in caplog.text


def test_where_padded_is_not_finite():
    """Eager attention of transformers in float64, in rows with pads on their left."""
    model = llama().model.double()
    model.set_attn_implementation("eager")
    expected, _ = hidden(model, shared=False)
    found, saved = hidden(model)
    assert saved > 0.3
    torch.testing.assert_close(found, expected)


def test_where_nothing_is_finite(caplog):
    model = llama().model
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    assert hidden(model)[1] == 0
    assert "LlamaModel keeps its padded batch: hidden states that are not finite" in caplog.text


def test_no_memory_for_the_probe_is_no_reason():
    """But an error, as it was without it; the next call asks again."""
    model, left = llama().model, [1]

    def full(module, inputs):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("no memory")

    model.layers[1].mlp.register_forward_pre_hook(full)
    with shared_prompts(model, always=True) as handle:
        with pytest.raises(torch.OutOfMemoryError):
            model(**plain())
        model(**plain())
        assert handle.tokens.saved > 0.3


def test_a_forward_in_the_place_of_one_that_is_gone():
    """Which Python may give its number."""

    def model(*changes):
        made = llama().model
        mlp, own = made.layers[0].mlp, made.layers[0].mlp.forward
        for change in changes:
            vars(mlp).pop("forward", None)
            mlp.forward = change(own)
            yield made

    def by_token(own):
        return lambda x: own(x) * 1.0

    def by_row(own):
        return lambda x: own(x) - own(x).mean(1, keepdim=True)

    expected = hidden(next(model(by_row)), shared=False)[0]
    call, made = plain(), model(by_token, by_row)
    with shared_prompts(next(made), always=True) as handle:
        handle.model(**call)
        found = next(made)(**call).last_hidden_state
    torch.testing.assert_close(found[call["attention_mask"] != 0], expected)


def test_attention_that_is_no_longer_causal(caplog):
    model, call = llama().model, plain()
    with shared_prompts(model, always=True):
        model(**call)
        model.config.is_causal = False
        found = model(**call).last_hidden_state
    assert "attention that is not causal" in caplog.text
    assert torch.equal(found, model(**call).last_hidden_state)


def test_hooks_of_the_callers_are_named(caplog):
    model = llama().model
    for layer in model.layers:
        layer.register_forward_hook(reads)
    model.register_forward_hook(around)
    model.embed_tokens.register_forward_hook(of_peft)
    assert hidden(model)[1] > 0.3
    assert [x.message for x in caplog.records] == [
        "fastpo: LlamaModel runs on packed rows: so does the hook reads"
    ]


def reads(module, inputs, output):
    """A hook."""


def around(module, inputs, output):
    """A hook of the whole backbone, which is given padded rows."""


def of_peft(module, inputs, output):
    """A hook of a library that is known."""


of_peft.__module__ = "peft.tuners.tuners_utils"


def test_what_is_not_finite_in_a_packed_row_alone(caplog):
    model = llama().model
    model.layers[1].register_forward_pre_hook(
        lambda _, inputs: (inputs[0] * (float("nan") if len(inputs[0]) == 1 else 1.0),)
    )
    found, saved = hidden(model)
    assert saved == 0 and found.isfinite().all()
    assert "nan off when packed" in caplog.text


def test_threads_wait_for_the_probe_of_one(monkeypatch):
    """Whose weights and modes they would run with."""
    probes, check = [], probe.check
    monkeypatch.setattr(probe, "check", lambda *a: (probes.append(a), time.sleep(0.05), check(*a)))
    model, expected = llama().model, hidden(llama().model, shared=False)[0]
    real = plain()["attention_mask"] != 0
    with shared_prompts(model, always=True), ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: model(**plain()), range(4)):
            torch.testing.assert_close(found.last_hidden_state[real], expected)
    assert len(probes) == 1


def test_a_call_looks_at_the_model_once(monkeypatch):
    looks, look = [], backbone.look
    monkeypatch.setattr(backbone, "look", lambda model: looks.append(model) or look(model))
    model = llama().model.train()
    with shared_prompts(model, always=True):
        model(**plain())
        monkeypatch.setattr(nn.Module, "modules", None)
        model(**plain())
    assert len(looks) == 2


def test_hidden_states_in_streams():
    """Gemma 3n's are [4, R, T, H]."""
    changes = {
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    }
    model, call, found = _architectures.model("Gemma3nText", changes), plain(), []
    for shared in (False, True):
        with shared_prompts(model, always=True) if shared else contextlib.nullcontext() as handle:
            found.append(model(**call, output_hidden_states=True).hidden_states)
    assert handle.tokens.saved > 0.3
    for own, ours in zip(*found, strict=True):
        real = call["attention_mask"] != 0
        torch.testing.assert_close(ours[..., real, :], own[..., real, :], rtol=1e-4, atol=1e-4)
