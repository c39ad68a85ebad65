"""Models on packed rows compute what they compute on padded ones."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest

pytest.importorskip("transformers")

import _architectures
import _batches
import torch
from _batches import BATCHES, model_of, run
from _tiny import one_thread  # noqa: F401
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.sharing import attention, packed, probe
from fastpo.integrations.sharing.backbone import shared_prompts

NAMES = ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi", "mixtral",
         "qwen2_moe", "cohere", "granite")  # fmt: skip
CASES = [(n, i) for n in NAMES for i in ("sdpa", "eager") if (n, i) != ("gemma2", "sdpa")]


@pytest.fixture(autouse=True)
def registries():
    yield
    attention.restore()


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        error = (found[2][name] - grad).abs().max()
        assert error <= 1e-4 * grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_loss_logits_and_gradients(name, implementation, kind):
    model, batch = model_of(name, implementation), BATCHES[kind]()
    *found, handle = run(model, batch, True)
    assert_same(found, run(model, batch, False)[:3])
    assert handle.tokens.saved > 0 or kind == "one_token_prompt"


@pytest.mark.parametrize("name", _architectures.RIGHT)
def test_architectures(name):
    def model():
        return _architectures.model(*_architectures.RIGHT[name])

    *found, handle = run(model, _batches.both(), True)
    assert_same(found, run(model, _batches.both(), False)[:3])
    samples = name == "phimoe"  # its experts, while it trains: prompts are not shared
    assert handle.tokens.saved > (0.1 if samples else 0.3)


def test_text_of_a_model_for_pictures():
    *found, handle = run(_architectures.llava, _batches.right(), True)
    assert_same(found, run(_architectures.llava, _batches.right(), False)[:3])
    assert handle.tokens.saved > 0.3


def test_pictures_from_several_layers_are_no_reason():
    model, (ids, mask) = _architectures.llava(), _batches.right()
    with shared_prompts(model, always=True) as handle:
        model(input_ids=ids, attention_mask=mask, vision_feature_layer=[-1, -2])
    assert handle.tokens.saved > 0.3


def test_text_has_an_implementation_of_its_own():
    def model():
        made = _architectures.llava()
        made.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
        return made

    *found, handle = run(model, _batches.right(), True)
    assert_same(found, run(model, _batches.right(), False)[:3])
    assert handle.tokens.saved > 0.3
    assert [key[0] for key in handle.packer.known] == ["eager"]


def test_what_is_not_worth_it_runs_as_before():
    """Pairs whose prompts are most of them are packed; rows with nothing in common are not."""
    prompts = torch.arange(3, 51).expand(4, 48)
    pairs = torch.cat((prompts, torch.randint(60, 300, (4, 16))), 1)
    apart = torch.randint(60, 300, (4, 64))
    model = model_of("llama", "sdpa")().eval()
    for ids, shares in ((pairs, True), (apart, False)):
        expected = model(input_ids=ids).logits
        with shared_prompts(model) as handle:
            found = model(input_ids=ids).logits
        assert (handle.tokens.saved > 0.4) == shares
        torch.testing.assert_close(found, expected, **({} if shares else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("window", [3, 8])
def test_windows_shorter_than_prompts(window):
    model = model_of("mistral", "sdpa", sliding_window=window)
    *found, _ = run(model, _batches.right(), True)
    assert_same(found, run(model, _batches.right(), False)[:3])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Layers run again in the backward, when no layout is active any more."""

    def model():
        made = model_of("llama", "sdpa")()
        made.gradient_checkpointing_enable({"use_reentrant": reentrant})
        made.enable_input_require_grads()
        return made

    *found, _ = run(model, _batches.right(), True)
    assert_same(found, run(model_of("llama", "sdpa"), _batches.right(), False)[:3])


def test_offloaded_activations():
    with torch.autograd.graph.save_on_cpu():
        *found, _ = run(model_of("llama", "sdpa"), _batches.right(), True)
    assert_same(found, run(model_of("llama", "sdpa"), _batches.right(), False)[:3])


def test_hidden_states_of_every_layer():
    (ids, mask), found = _batches.both(), []
    for shared in (False, True):
        model = model_of("mixtral", "sdpa")().eval()
        with shared_prompts(model, always=True) if shared else contextlib.nullcontext():
            inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
            found.append(model(**inputs, output_router_logits=True))
    assert type(found[0]) is type(found[1])
    for own, ours in zip(found[0].hidden_states, found[1].hidden_states, strict=True):
        torch.testing.assert_close(ours[mask != 0], own[mask != 0], rtol=1e-4, atol=1e-4)
    for own, ours in zip(found[0].router_logits, found[1].router_logits, strict=True):
        real = mask.flatten() != 0
        torch.testing.assert_close(ours[real], own[real], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_exact_as_padded():
    batch = _batches.right()
    truth = run(model_of("llama", "sdpa"), batch, False, torch.float64)
    packed, padded = (
        run(model_of("llama", "sdpa"), batch, shared, torch.bfloat16) for shared in (True, False)
    )
    for name, grad in truth[2].items():
        errors = [(side[2][name].double() - grad).abs().max() for side in (packed, padded)]
        assert errors[0] <= 2 * errors[1] + 0.01 * grad.abs().max(), name


def test_packing_alone_shares_nothing():
    batch = _batches.right()
    *found, handle = run(model_of("llama", "sdpa"), batch, True, share=False)
    assert_same(found, run(model_of("llama", "sdpa"), batch, False)[:3])
    assert handle.tokens.computed == batch[1].sum() + 0


def test_active_dropout_is_not_shared():
    model, (ids, mask) = model_of("llama", "sdpa", attention_dropout=0.5)(), _batches.right()
    model.train()
    with shared_prompts(model, always=True) as handle:
        model(input_ids=ids, attention_mask=mask)
        assert handle.tokens.computed == mask.sum()
        handle.tokens.computed = 0
        model.eval()(input_ids=ids, attention_mask=mask)
        assert handle.tokens.computed < mask.sum()


# What must not pass unnoticed: each breaks one part of the layout.


def without_masks(monkeypatch):
    monkeypatch.setattr(attention._Mask, "_ask", lambda *_, **__: None)
    monkeypatch.setattr(packed.Sdpa, "_backwards", lambda *_: None)


def restarted_positions(monkeypatch):
    from fastpo.layout.tree import Layout

    def positions(layout):
        return torch.cat([torch.arange(row.owned) for row in layout.rows])

    monkeypatch.setattr(Layout, "positions", property(positions))


def shifted_start(monkeypatch):
    def shift(owner, name):
        own = getattr(owner, name)

        def asked(*arguments, **changes):
            mask = own(*arguments, **changes)
            return mask if mask is None else mask.roll(1, 2)

        monkeypatch.setattr(owner, name, asked)

    shift(attention._Mask, "_ask")
    shift(packed.Sdpa, "_backwards")


BROKEN = [without_masks, restarted_positions, shifted_start]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("broken", BROKEN)
def test_the_comparison_can_fail(broken, implementation, monkeypatch):
    model = model_of("llama", implementation)
    expected = run(model, _batches.right(), False)
    monkeypatch.setattr(probe, "check", lambda *_: None)
    broken(monkeypatch)
    found = run(model, _batches.right(), True)
    error = (found[1] - expected[1]).abs().max() / expected[1].abs().max()
    assert error > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("broken", BROKEN)
def test_the_probe_sees_it(broken, implementation, monkeypatch, caplog):
    say_once.cache_clear()
    broken(monkeypatch)
    model, batch = model_of("llama", implementation), _batches.right()
    *found, handle = run(model, batch, True)
    assert_same(found, run(model, batch, False)[:3])
    assert handle.tokens.saved == 0
    assert "off when packed" in caplog.text


def test_a_function_of_somebody_with_torchs_masks():
    """It may look at the order of queries, here for how far away a key is, and gets its masks."""

    def attend(module, query, key, value, attention_mask, **_):
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        at = torch.arange(key.shape[2])
        away = at[key.shape[2] - query.shape[2] :, None] - at
        scores = query @ key.transpose(2, 3) * module.scaling - away.abs()
        seen = away >= 0 if attention_mask is None else attention_mask
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("theirs", attend)
    AttentionMaskInterface.register("theirs", sdpa_mask)
    model, batch = model_of("llama", "theirs"), _batches.right()
    *found, handle = run(model, batch, True)
    assert_same(found, run(model, batch, False)[:3])
    assert handle.tokens.saved > 0.3


def test_a_deep_copy_packs_for_itself():
    model, (ids, mask) = model_of("llama", "sdpa")(), _batches.right()
    handle = shared_prompts(model, always=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(2)
        expected = model_of("llama", "sdpa")()
        expected.model.embed_tokens.weight.mul_(2)
        found = twin(input_ids=ids, attention_mask=mask).logits[mask != 0]
        own = expected(input_ids=ids, attention_mask=mask).logits[mask != 0]
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    handle.detach()


def centred(mlp, inputs, output):
    """Of all tokens of a row."""
    return output - output.mean(1, keepdim=True)


def by_columns(mlp, inputs):
    x = inputs[0]
    return (x + torch.linspace(0, 1, x.shape[1]).view(1, -1, 1),)


def forward_of_its_own(model):
    mlp, own = model.layers[0].mlp, model.layers[0].mlp.forward
    mlp.forward = lambda x: centred(mlp, x, own(x))


class Centred(nn.Module):
    def forward(self, x):
        return centred(self, x, x)


def another_layer(model):
    model.layers[0].mlp = nn.Sequential(model.layers[0].mlp, Centred())


CHANGES = {
    "hook": lambda model: model.layers[0].mlp.register_forward_hook(centred),
    "pre-hook": lambda model: model.layers[1].mlp.register_forward_pre_hook(by_columns),
    "forward": forward_of_its_own,
    "layer": another_layer,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_on_a_layer_later_is_looked_at(change):
    ids, mask = _batches.right()
    found = []
    for shared in (False, True):
        model = model_of("llama", "sdpa")().model
        with shared_prompts(model, always=True) if shared else contextlib.nullcontext() as handle:
            model(input_ids=ids, attention_mask=mask)
            undo = CHANGES[change](model)
            found.append(model(input_ids=ids, attention_mask=mask).last_hidden_state[mask != 0])
            if undo is not None and shared:
                undo.remove()
                handle.tokens.computed = handle.tokens.padded = 0
                model(input_ids=ids, attention_mask=mask)
                assert handle.tokens.saved > 0.3
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_in_shards_no_process_probes_alone(monkeypatch):
    """One may have a hook that the others have not, and they would not answer."""
    ids, mask = _batches.right()
    model = model_of("llama", "sdpa")().model
    with shared_prompts(model, always=True) as handle:
        model(input_ids=ids, attention_mask=mask)
        model.layers[0].mlp.down_proj.weight.ds_id = 0  # of ZeRO-3
        model.layers[0].mlp.register_forward_hook(lambda *_: None)
        handle.tokens.computed = handle.tokens.padded = 0
        monkeypatch.setattr(probe, "check", None)
        model(input_ids=ids, attention_mask=mask)
        assert handle.tokens.saved == 0 < handle.tokens.padded


def test_noise_on_embeddings_is_that_of_whole_rows():
    ids, mask = _batches.right()
    found = []
    for shared in (False, True):
        model = model_of("llama", "sdpa")().model
        with shared_prompts(model, always=True) if shared else contextlib.nullcontext() as handle:
            model(input_ids=ids, attention_mask=mask)
            model.train().embed_tokens.neftune_noise_alpha = 5.0
            model.embed_tokens.register_forward_hook(neftune_post_forward_hook)
            torch.manual_seed(0)
            found.append(model(input_ids=ids, attention_mask=mask).last_hidden_state)
            if shared:
                handle.tokens.computed = handle.tokens.padded = 0
                model.eval()(input_ids=ids, attention_mask=mask)
                assert handle.tokens.saved > 0.3  # no noise
    assert torch.equal(*found)


def test_a_pickle_packs_in_another_process():
    model, (ids, mask) = model_of("llama", "sdpa")(), _batches.right()
    with shared_prompts(model, always=True):
        own = model(input_ids=ids, attention_mask=mask).logits
        pickled = pickle.dumps(model)
    attention.restore()
    twin = pickle.loads(pickled)
    torch.testing.assert_close(twin(input_ids=ids, attention_mask=mask).logits, own)
    tokens = vars(twin.model)["_fastpo"].tokens
    assert tokens.padded == 2 * ids.numel() and tokens.saved > 0.3


def test_the_model_is_given_back():
    model, (ids, mask) = model_of("llama", "sdpa")(), _batches.right()
    with shared_prompts(model):
        assert "forward" in vars(model.model)
        model(input_ids=ids, attention_mask=mask)
    assert not {"forward", "_fastpo"} & vars(model.model).keys()
    attention.restore()
    names = attention.AttentionMaskInterface._global_mapping.values()
    assert not any(isinstance(f, attention._Mask) for f in names)
    assert not hasattr(attention.AttentionInterface.get_interface, "hidden")


def test_generation_is_untouched():
    model = model_of("llama", "sdpa")().eval()
    ids = _batches.right()[0][:1, :8]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with shared_prompts(model) as handle:
        assert torch.equal(model.generate(ids, **options), expected)
    assert handle.tokens.saved == 0


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "text"])
def test_other_models_are_an_error(model):
    with pytest.raises(ValueError, match="model: expected a transformers model"):
        shared_prompts(model)
