"""TRL's trainers that build logits: the same losses, metrics and parameters, without them."""

from __future__ import annotations

import contextlib
import importlib

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo import planner
from fastpo.integrations.lazy import cell
from fastpo.integrations.seams.saying import say_once


def gold():
    return tiny.preferences().map(lambda row: {"reference": row["chosen"]})


def lora():
    return {"peft_config": _trainers.lora(target_modules=["q_proj", "lm_head"])}


def parity(completions, **_):
    """Two values only, so that some pairs tie."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 2) for text in texts]


def online():
    return {"reward_funcs": parity}


SAMPLED = {"max_new_tokens": 4, "temperature": 0.9}
SMOOTHED = {
    "loss_type": "nll",  # TRL 1.13 and 1.14 cannot smooth their default
    "label_smoothing_factor": 0.1,
    "per_device_train_batch_size": 4,
}
# name: (trainer, data, model, config on top, arguments of the trainer)
TRAINERS = {
    "cpo": ("CPO", tiny.preferences, "llama", {}, dict),
    "cpo_hinge": ("CPO", tiny.preferences, "phi", {"loss_type": "hinge"}, dict),
    "cpo_ipo": ("CPO", tiny.preferences, "llama_tied", {"loss_type": "ipo"}, dict),
    "simpo": (
        "CPO",
        tiny.preferences,
        "cohere",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
        dict,
    ),
    "alphapo": ("CPO", tiny.preferences, "granite", {"loss_type": "alphapo", "alpha": 0.1}, dict),
    "cpo_moe": ("CPO", tiny.preferences, "qwen2_moe", {}, dict),
    "cpo_lora": ("CPO", tiny.preferences, "llama", {}, lora),
    "orpo": ("ORPO", tiny.preferences, "gemma2", {}, dict),
    "tpo": ("TPO", gold, "llama", {}, dict),
    "tpo_l": ("TPO", gold, "llama", {"loss_type": "tpo-l", "tpo_alpha": 0.0}, dict),
    "a2po": (
        "A2PO",
        tiny.prompts,
        "llama",
        {"max_completion_length": 4, "num_value_samples": 2},
        online,
    ),
    "online_dpo": ("OnlineDPO", tiny.prompts, "llama", SAMPLED, online),
    "sft_smoothed": ("SFT", tiny.conversations, "llama", SMOOTHED, dict),
}


def trainer(name, folder):
    prefix, data, model, changes, arguments = TRAINERS[name]
    path = _trainers.saved(folder, model)
    own = tiny.model(model) if prefix in ("CPO", "ORPO") else path
    return _trainers.build(prefix, folder, own, data(), changes, **arguments())


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setattr(cell, "told", set())
    calls = tiny.count_calls(monkeypatch)
    _trainers.assert_trains_the_same(lambda: trainer(name, tmp_path), calls)
    assert len(calls) >= 3
    assert not cell.told, "nothing computes full logits"


@pytest.mark.parametrize("name", ["cpo", "orpo", "tpo", "sft_smoothed"])
def test_no_tensor_is_wider_than_the_head(name, tmp_path, monkeypatch):
    """Full logits would be: 4 rows of about 20 tokens times V, against V times 32.

    A budget of 0: what is kept for the backward also has room for d weight.
    """
    small = planner.Tiles(8, 64)
    monkeypatch.setattr(planner, "tile_shape", lambda *_: small)
    widths = {}
    for patched in (False, True):
        with fastpo.patched(budget=0) if patched else contextlib.nullcontext():
            built = trainer(name, tmp_path)
            batch = next(iter(built.get_train_dataloader()))
            with tiny.Widest() as widest:
                built.compute_loss(built.model, batch).backward()
        widths[patched] = widest.elements
    head = built.model.lm_head.weight.numel()
    assert widths[True] <= head < widths[False]


@pytest.mark.parametrize("name", ["cpo", "tpo"])
def test_evaluation_hands_out_real_logits(name, tmp_path):
    with fastpo.patched():
        built = trainer(name, tmp_path)
        batch = next(iter(built.get_train_dataloader()))
        _, logits, _ = built.prediction_step(built.model, batch, prediction_loss_only=False)
    assert isinstance(logits, torch.Tensor)


def test_a_head_fastpo_does_not_know_stays_itself(tmp_path, caplog):
    class Own(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    say_once.cache_clear()
    with fastpo.patched():
        built = trainer("cpo", tmp_path)
        built.model.lm_head.__class__ = Own
        built.train()
    assert built.state.global_step == 3
    assert [r.message for r in caplog.records if "keeps its full logits" in r.message] == [
        "fastpo: CPOTrainer keeps its full logits: LlamaForCausalLM.get_output_embeddings(): "
        f"expected a torch.nn.Linear, or bitsandbytes' own, got {Own.__module__}.Own"
    ]


def test_everything_is_given_back():
    kind = _trainers.module("CPO").CPOTrainer
    module = importlib.import_module(kind.__module__)
    before = {name: vars(kind)[name] for name in ("concatenated_forward", "get_batch_logps")}
    select = module.selective_log_softmax
    with fastpo.patched():
        assert vars(kind)["concatenated_forward"] is not before["concatenated_forward"]
        assert module.selective_log_softmax is not select
    assert {name: vars(kind)[name] for name in before} == before
    assert all(vars(kind)[name] is value for name, value in before.items())
    assert module.selective_log_softmax is select
