"""Attention and masks of somebody else's: left as they were, each by its reason."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import _tiny as tiny
import pytest

pytest.importorskip("transformers")

import _architectures
import _batches
import torch
from _refusals import assert_as_before, fresh, llama, plain  # noqa: F401
from _tiny import one_thread  # noqa: F401
from transformers import LlamaModel, masking_utils, modeling_utils

from fastpo.integrations.sharing import attention, refusals
from fastpo.integrations.sharing.backbone import shared_prompts
from fastpo.integrations.sharing.packed import Refused
from fastpo.layout.tree import layout_of


def replaced_mask(model):
    model(**plain())
    own = masking_utils.AttentionMaskInterface._global_mapping["sdpa"].original
    masking_utils.AttentionMaskInterface.register("sdpa", own)


def replaced_attention(model):
    model(**plain())
    own = modeling_utils.AttentionInterface._global_mapping["sdpa"].original
    modeling_utils.AttentionInterface.register("sdpa", own)


def local_mask(model):
    model(**plain())
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = masking_utils.sdpa_mask


def local_attention(model):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model(**plain())
    modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward


@pytest.fixture
def local():
    yield
    for registry in (
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
        modeling_utils.ALL_ATTENTION_FUNCTIONS,
    ):
        registry._local_mapping.clear()


@pytest.mark.parametrize("befall", [replaced_mask, replaced_attention, local_mask, local_attention])
def test_hooks_that_others_have_replaced(befall, local, caplog):
    assert_as_before(llama, plain, "attention 'sdpa' of somebody else's", caplog, befall)


def test_an_implementation_that_is_not_in_the_registry(caplog):
    def make():
        model = llama()
        model.config._attn_implementation = "fastpo_test"
        return model

    modeling_utils.AttentionInterface.register(
        "fastpo_test", modeling_utils.AttentionInterface._global_mapping["sdpa"]
    )
    try:
        assert_as_before(make, plain, "attention 'fastpo_test'", caplog)
    finally:
        del modeling_utils.AttentionInterface._global_mapping["fastpo_test"]


def test_another_implementation_or_dtype_is_looked_at_anew():
    model = llama()
    with shared_prompts(model.model, always=True) as handle:
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            found = model.model(**plain()).last_hidden_state
            expected = tiny.model("llama").model(**plain()).last_hidden_state
            real = plain()["attention_mask"] != 0
            torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
        assert len(handle.packer.known) == 2
        model.double().model(**plain())
        assert len(handle.packer.known) == 3


def test_a_mask_rule_of_its_own(caplog, monkeypatch):
    """Which transformers has evaluated by vmap; here it comes behind the probe."""
    own = masking_utils.create_causal_mask

    def with_a_rule(model):
        model(**plain())
        rule = masking_utils.causal_mask_function
        changed = functools.partial(own, and_mask_function=rule)
        monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", changed)

    assert_as_before(llama, plain, "a mask rule of its own", caplog, with_a_rule)


def test_what_a_mask_is_asked_for():
    """For all queries of the packed row, by name; what it may leave out is kept for the rows."""
    layout, asked = layout_of(_batches.right()[0]), attention._Mask(masking_utils.sdpa_mask)
    given = {"batch_size": 1, "q_length": layout.size, "kv_length": layout.size, "local_size": 7}
    with attention.active(layout):
        for skips in (True, False):
            found = asked(**given, allow_is_causal_skip=skips)
            assert found.skips is skips and found.size == 7
        for args, changes in (((1,), {}), ((), {"q_length": layout.size - 1})):
            with pytest.raises(Refused, match="a mask rule of its own"):
                asked(*args, **{**given, **changes})


def test_what_a_call_says_is_before_the_config():
    """And a word of its own is no row."""
    model = llama().model
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with shared_prompts(model, always=True) as handle:
        model(**plain(), output_attentions=False, kind="a word")
    assert handle.tokens.saved > 0.3


class Own(LlamaModel):
    """Somebody's backbone, which may do anything with labels."""


def test_labels_for_a_backbone_of_somebody(caplog):
    def make():
        model = llama()
        model.model.__class__ = Own
        return model

    call = lambda: {**plain(), "labels": plain()["input_ids"]}  # noqa: E731
    assert_as_before(make, call, "labels is given", caplog)


def test_rows_without_pads_beyond_the_length_at_which_a_rope_changes():
    """All that pads could change is as it was."""
    rope = {"rope_type": "dynamic"}
    text = SimpleNamespace(rope_parameters=rope, max_position_embeddings=16)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    refusals.check_rotation(model, SimpleNamespace(columns=24, shape=(6, 24)))


def test_eager_attention_that_somebody_registered(caplog):
    model = llama()
    model.set_attn_implementation("eager")

    def nothing(module, query, *_, **__):
        return query.transpose(1, 2) * 0.0, None

    registered = modeling_utils.AttentionInterface._global_mapping
    with shared_prompts(model, always=True) as handle:
        model.model(**plain())
        registered["eager"] = nothing
        try:
            attention.restore()
            expected = model.model(**plain()).last_hidden_state
            attention.install("eager")
            assert torch.equal(model.model(**plain()).last_hidden_state, expected)
        finally:
            del registered["eager"]
    assert handle.tokens.computed > 2 * plain()["input_ids"].numel()


class Odd:
    """A registered implementation of somebody's, with parameters of its own."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        own = modeling_utils.AttentionInterface._global_mapping["sdpa"]
        modeling_utils.AttentionInterface.register(self.name, own)

        def mask(batch_size, q_length, kv_length, q_offset, attention_mask, **_):
            return None

        masking_utils.AttentionMaskInterface.register(self.name, mask)

    def __exit__(self, *_):
        del modeling_utils.AttentionInterface._global_mapping[self.name]
        del masking_utils.AttentionMaskInterface._global_mapping[self.name]


def test_a_mask_function_of_other_parameters(caplog):
    def make():
        model = llama()
        model.config._attn_implementation = "fastpo_odd"
        return model

    with Odd("fastpo_odd"):
        assert_as_before(make, plain, "a mask function that does not take kv_offset", caplog)


def test_a_model_that_fails_in_the_probe(caplog, monkeypatch):
    """It looks at its mask itself."""
    own = masking_utils.create_causal_mask

    def looked_at(*args, **kwargs):
        mask = own(*args, **kwargs)
        assert mask is None or mask.ndim == 4, "four dimensions"
        return mask

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", looked_at)
    assert_as_before(llama, plain, "it fails in the probe: AttributeError", caplog)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_what_mask_functions_of_transformers_take(name):
    mask = masking_utils.AttentionMaskInterface._global_mapping[name]
    assert set(inspect.signature(mask).parameters) >= attention._ASKED


def test_a_part_of_the_queries(caplog):
    """Gemma 4's layers that share keys are given the last tokens alone."""
    gemma4 = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    if not hasattr(gemma4.Gemma4TextModel, "_maybe_slice_kv_shared_inputs"):
        pytest.skip("this transformers gives them all tokens")

    def last():
        return {**plain(), "logits_to_keep": 3}

    def make():
        return _architectures.model(*_architectures.RIGHT["gemma4_shared_keys"])

    model, expected = make(), make()(**last()).logits
    with shared_prompts(model, always=True) as handle:
        torch.testing.assert_close(model(**last()).logits, expected, rtol=0, atol=0)
        assert handle.tokens.saved == 0
    assert "a part of its mask is taken" in caplog.text
