"""How a model under `attach` may be called, and what becomes of what it returns."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys

import _tiny as tiny
import pytest
import torch
import transformers

import fastpo
from fastpo.integrations import attach
from fastpo.integrations.heads import logit_map


class _Passing(transformers.LlamaForCausalLM):
    """Names nothing itself."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("shared", [False, True])
def test_by_position_through_a_forward_without_names(shared):
    model, inputs = tiny.model("llama"), tiny.batch()
    expected = model(**inputs).loss
    model.__class__ = _Passing
    ids = inputs.pop("input_ids")
    with fastpo.attach(model, shared_prompts=shared):
        torch.testing.assert_close(model(ids, **inputs).loss, expected)


def test_more_by_position_than_it_takes():
    model, inputs = tiny.model("llama"), tiny.batch()
    with (
        fastpo.attach(model) as attached,
        pytest.raises(ValueError, match="inputs: expected by name, got 99 by position"),
    ):
        attached.model(*[None] * 99, labels=inputs["labels"])


class _Unscored(transformers.LlamaForCausalLM):
    """Has no use for labels."""

    def forward(self, *args, labels=None, **kwargs):
        return super().forward(*args, **kwargs)


class _Twice(transformers.LlamaForCausalLM):
    """A second look at all positions, of which its own forward takes some."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, output_hidden_states=True, **kwargs)
        output.logits = self.lm_head(output.hidden_states[-1])
        return output


class _Early(transformers.LlamaForCausalLM):
    """A loss of what no head has made."""

    def forward(self, *args, labels=None, **kwargs):
        words = self.config.vocab_size
        loss = self.loss_function(torch.zeros(3, 12, words), labels, vocab_size=words)
        return super().forward(*args, **kwargs) | {"loss": loss}


# Forward -> what is given beside the batch, and the error.
CALLS = {
    _Unscored: ({}, RuntimeError, "forward does not go through get_output_embeddings and loss"),
    _Twice: ({}, RuntimeError, "its forward calls the head twice"),
    _Early: ({}, RuntimeError, "its loss comes before get_output_embeddings"),
    _Passing: ({"return_dict": False}, ValueError, "return_dict: expected True, got a tuple"),
    # The model's own, before it comes to its head.
    transformers.LlamaForCausalLM: ({"input_ids": None}, ValueError, "^You must specify"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_what_goes_wrong_is_told(kind):
    given, error, message = CALLS[kind]
    model = tiny.model("llama")
    model.__class__ = kind
    with fastpo.attach(model), pytest.raises(error, match=message):
        model(**tiny.batch() | given)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_it_returns_is_pickled_and_copied(name):
    model = tiny.model(name).requires_grad_(False)
    with fastpo.attach(model):
        output = model(**tiny.batch(), use_cache=False)
    for twin in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert type(twin) is type(output) and list(twin) == list(output)
        torch.testing.assert_close(dict(twin), dict(output))


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "ways", [(copy.deepcopy, _pickled), (_pickled, _pickled), (_pickled, copy.deepcopy, _pickled)]
)
def test_copies_of_copies_have_the_head(ways, shared):
    """A deep copy, of a policy before it is sent to another process for one."""
    model, inputs = tiny.model("llama"), tiny.batch()
    expected = model(**inputs).loss
    fastpo.attach(model, shared_prompts=shared)
    for way in ways:
        model = way(model)
    output = model(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    model._fastpo.detach()
    assert model(**inputs).logits is not None and "forward" not in vars(model)


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("detached_first", [False, True])
def test_what_accelerate_unwraps_keeps_the_head(wrapped_first, detached_first):
    """Without its own wrapper for mixed precision it takes off everybody's."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, inputs = tiny.model("llama"), tiny.batch()
    expected = model(**inputs).loss
    try:
        prepared = accelerator.prepare(model) if wrapped_first else model
        handle = fastpo.attach(model)
        prepared = prepared if wrapped_first else accelerator.prepare(model)
        if detached_first:
            handle.detach()
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert (unwrapped(**inputs).logits is None) == (not detached_first)
    assert "labels" in inspect.signature(unwrapped.forward).parameters
    handle.detach()
    output = unwrapped(**inputs)
    assert output.logits is not None and "_fastpo" not in vars(model)
    # Under what was attached after it, accelerate's wrapper stays.
    torch.testing.assert_close(output.loss, expected, rtol=1e-2 if wrapped_first else 1e-6, atol=0)


@pytest.mark.parametrize("kind", [fastpo.attach, fastpo.lazy_logits, fastpo.shared_prompts])
def test_detached_after_the_class_has_another_forward(kind, monkeypatch):
    """That of Liger's kernels, or its own again after `patched(lazy=True)`."""
    model = tiny.model("llama")
    owner = model if kind is not fastpo.shared_prompts else model.model
    before, own = set(vars(owner)), type(owner).forward
    handle = kind(model)
    monkeypatch.setattr(type(owner), "forward", lambda self, *args, **given: own(self, **given))
    handle.detach()
    assert set(vars(owner)) == before


def test_what_accelerate_unwraps_is_lazy_where_all_are():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    inputs = {"input_ids": tiny.batch()["input_ids"]}
    try:
        with fastpo.patched(lazy=True):
            prepared = accelerator.prepare(tiny.model("llama"))
            model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            assert type(model(**inputs).logits).__name__ == "LazyLogits"
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert type(model(**inputs).logits) is torch.Tensor


@pytest.mark.parametrize("ignored", [-100, 3])
def test_another_label_may_be_ignored(ignored):
    model, inputs = tiny.model("llama"), tiny.batch()
    inputs["labels"] = torch.arange(36).view(3, 12) % 7
    own = model(**inputs, ignore_index=ignored).loss
    with fastpo.attach(model):
        found = model(**inputs, ignore_index=ignored)
    torch.testing.assert_close(found.loss, own)
    scored = inputs["labels"][:, 1:] != ignored
    assert torch.equal(found.logps != 0, scored)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_that_a_hook_rounds(name):
    model = tiny.model(name)
    model.lm_head.register_forward_hook(lambda *given: given[-1].bfloat16())
    own = model(**tiny.batch()).loss.float()
    with fastpo.attach(model):
        torch.testing.assert_close(model(**tiny.batch()).loss, own, rtol=1e-2, atol=0)


FACTORS = {
    "Cohere": ({"logit_scale": 0.5}, 0.5),
    "MuseGlimmer": ({"output_multiplier": 0.5}, 0.5),
    "FalconH1": ({"lm_head_multiplier": 0.5}, 0.5),
    "Granite": ({"logits_scaling": 4.0}, 0.25),
    "HyperCLOVAX": ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
    "MiniCPM3": ({"logits_scaling": 4.0, "model_type": "minicpm3"}, 1.0),
    "Llama": ({}, 1.0),
}


@pytest.mark.parametrize("family", FACTORS)
def test_factors_of_logits_by_their_names(family):
    """Also of families that the installed transformers has not."""
    options, factor = FACTORS[family]
    config = transformers.PretrainedConfig()
    vars(config).update({"model_type": family.lower(), **options})
    assert logit_map(config) == (None, factor)


def test_gradients_of_each_row_by_vmap_are_refused_by_name():
    model, inputs = tiny.model("llama", attn_implementation="eager"), tiny.batch()
    weights = {name: x.detach() for name, x in model.named_parameters()}

    def loss(weights, ids, labels):
        given = {"input_ids": ids[None], "labels": labels[None]}
        return torch.func.functional_call(model, weights, (), given).loss

    rows = inputs["input_ids"], inputs["labels"]
    with fastpo.attach(model):
        for function in (loss, torch.func.grad(loss)):
            with pytest.raises(RuntimeError, match=r"^attach: .* outside torch\.func"):
                torch.func.vmap(function, (None, 0, 0))(weights, *rows)


@pytest.mark.parametrize("name", ["share", "always"])
def test_flags_of_shared_prompts(name):
    with pytest.raises(ValueError, match=f"{name}: expected True or False, got 'no'"):
        fastpo.shared_prompts(tiny.model("llama"), **{name: "no"})


def test_the_flag_of_attach():
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="shared_prompts: expected True or False, got 'no'"):
        fastpo.attach(model, shared_prompts="no")
    fastpo.attach(model).detach()


def test_a_model_without_a_head():
    with pytest.raises(RuntimeError, match=r"LlamaModel.get_output_embeddings.*, got none"):
        fastpo.attach(tiny.model("llama").model)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("text", ["cohere", "granite", "gemma2"])
def test_a_model_for_pictures_whose_forward_treats_no_logits(text, waits, monkeypatch):
    """Only that of its text would scale or cap them, as the config says."""
    monkeypatch.setattr(attach, "_waits", lambda x: waits)
    model, inputs = tiny.vision_language_model(text), tiny.batch()
    assert logit_map(model.config) != (None, 1.0)
    expected = model(**inputs).loss
    expected_gradients = torch.autograd.grad(expected, model.lm_head.weight)
    fastpo.attach(model)
    for _ in range(2):
        loss = model(**inputs).loss
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, model.lm_head.weight)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
    handle = model.lm_head.register_forward_hook(lambda module, given, logits: logits * 2)
    with pytest.raises(RuntimeError, match="changes its logits in another way than logit_scale="):
        model(**inputs)
    handle.remove()
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_a_call_looks_for_no_package(monkeypatch):
    """Where PEFT is not imported no layer is one of its: importing it takes seconds, and looking
    for it where it is not installed took a seventh of a small model's step."""
    for name in [x for x in sys.modules if x.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    model, inputs = tiny.model("llama"), tiny.batch()
    with fastpo.attach(model):
        model(**inputs).loss.backward()
    assert "peft" not in sys.modules
