"""`fastpo.patch` under TRL 1.13 and 1.14: trainers that build logits, or chunk them themselves.

What is the same for every version is in the other `test_trl*.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from importlib import metadata

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl.trainer.utils as utils
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.lazy import cell
from fastpo.integrations.seams.saying import say_once
from fastpo.testing import HeadInputs

VERSION = metadata.version("trl").rpartition(".")[0]
pytestmark = pytest.mark.skipif(
    VERSION not in ("1.13", "1.14"), reason="later versions have a fused head"
)
only_14 = pytest.mark.skipif(VERSION != "1.14", reason="1.14's chunked path")
only_13 = pytest.mark.skipif(VERSION != "1.13", reason="1.13's own Liger losses")
SAMPLED = {"num_generations": 2, "max_completion_length": 4}

# name: (TRL's prefix, model, config on top, arguments of the trainer)
TRAINERS = {
    "dpo": ("DPO", "gemma2", {"loss_type": ["sigmoid", "sft"]}, dict),
    "dpo_moe": ("DPO", "qwen2_moe", {"use_weighting": True}, dict),
    "dpo_lora_on_the_head": ("DPO", "llama", {}, "lora"),
    "dpo_precomputed": ("DPO", "llama", {"precompute_ref_log_probs": True}, dict),
    "kto": ("KTO", "phi", {}, dict),
    "kto_precomputed": ("KTO", "llama", {"precompute_ref_log_probs": True}, dict),
    "sft": ("SFT", "gemma2", {}, dict),
    "sft_scale_moe": ("SFT", "qwen2_moe", {}, dict),
    "sft_nll": ("SFT", "cohere", {"loss_type": "nll"}, dict),
    "sft_smoothed": ("SFT", "llama", {"loss_type": "nll", "label_smoothing_factor": 0.1}, dict),
    "sft_nll_lora_on_the_head": ("SFT", "llama_tied", {"loss_type": "nll"}, "lora"),
    "grpo": ("GRPO", "granite", {**SAMPLED, "beta": 0.1, "entropy_coef": 0.1}, "rewarded"),
    "rloo": ("RLOO", "cohere", {**SAMPLED, "temperature": 0.7}, "rewarded"),
}


def arguments(kind):
    if kind == "lora":
        return {"peft_config": _trainers.lora(target_modules=["q_proj", "lm_head"])}
    return {"reward_funcs": _trainers.reward} if kind == "rewarded" else {}


def built(prefix, folder, path, changes, **given):
    if prefix in ("GRPO", "RLOO"):
        pytest.importorskip("requests", reason="this TRL imports it")
    torch.manual_seed(0)  # these versions draw adapters from whatever state there is
    data = _trainers.DATA[prefix]()
    return _trainers.build(prefix, folder, str(path), data, changes, **given)


@pytest.fixture
def full_logits(monkeypatch):
    """What was computed on full logits after all."""
    monkeypatch.setattr(cell, "told", set())
    return cell.told


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_same(name, tmp_path, monkeypatch, full_logits):
    prefix, model, changes, kind = TRAINERS[name]
    path = _trainers.saved(tmp_path, model)
    calls, runs = tiny.count_calls(monkeypatch), []
    for patched in (False, True):
        if patched:
            refuse_real_logits(prefix, monkeypatch)
        with fastpo.patched() if patched else contextlib.nullcontext():
            runs.append(_trainers.train(built(prefix, tmp_path, path, changes, **arguments(kind))))
        assert bool(calls) == patched
    _trainers.assert_same(runs[1], runs[0])
    assert not full_logits


def refuse_real_logits(prefix, monkeypatch):
    """A reference's, too, are a promise."""
    module = importlib.import_module(f"trl.trainer.{prefix.lower()}_trainer")

    @functools.wraps(module.selective_log_softmax)
    def refuse(*args, **kwargs):
        pytest.fail("real logits")

    monkeypatch.setattr(module, "selective_log_softmax", refuse)


LIGER = {
    "DPO": {"loss_type": ["sigmoid", "sft"]},
    "KTO": {},
    "GRPO": {**SAMPLED, "beta": 0.1, "entropy_coef": 0.1},
}


@only_14
@pytest.mark.parametrize("prefix", LIGER)
def test_chunked_paths_train_the_same(prefix, tmp_path, monkeypatch):
    """`use_liger_kernel`: TRL multiplies the head's weight itself."""
    pytest.importorskip("liger_kernel")
    path = _trainers.saved(tmp_path, "phi")  # Liger has no layers for it, and it has a bias
    changes = {**LIGER[prefix], "use_liger_kernel": True}
    given = arguments("rewarded" if prefix == "GRPO" else None)
    calls, runs = tiny.count_calls(monkeypatch), []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            runs.append(_trainers.train(built(prefix, tmp_path, path, changes, **given)))
        assert bool(calls) == patched
    _trainers.assert_same(runs[1], runs[0])
    assert all("entropy" in spec.outputs for spec in calls)


def apply(inputs):
    return utils._ChunkedLogProbFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.labels, 0.7, 16, 3.0, 0.5
    )


def test_the_chunked_head_is_ours():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    own = HeadInputs(hidden, weight, torch.randint(0, 40, (5,))).like(torch.float32)
    ours = own.like(torch.float32)
    expected = apply(own)
    with fastpo.patched():
        found = apply(ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    for logps, entropy in (expected, found):
        (logps.square().sum() + entropy.square().sum()).backward()
    assert own.weight.grad.abs().max() > 0.1
    for name, leaf in own.leaves().items():
        mine = ours.leaves()[name].grad
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(9)])
@pytest.mark.parametrize("ignored", ["some", "all"])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_chunked_loss(shifted, ignored, items, monkeypatch):
    """Loss, correct tokens, entropy and count, and gradients, of SFT's default loss."""
    calls = tiny.count_calls(monkeypatch)
    sft = importlib.import_module("trl.trainer.sft_trainer")
    torch.manual_seed(0)
    inputs = HeadInputs(torch.randn(2, 6, 8), torch.randn(40, 8), torch.randint(0, 40, (2, 6)))
    inputs.labels[0, :3] = -100
    if ignored == "all":
        inputs.labels.fill_(-100)
    bias, runs = torch.randn(40), []
    for patched in (False, True):
        leaf = inputs.like(torch.float32)
        named = {"shift_labels" if shifted else "labels": inputs.labels}
        with fastpo.patched(budget=1234, backend="torch") if patched else contextlib.nullcontext():
            found = sft._chunked_cross_entropy_loss(
                leaf.hidden,
                leaf.weight,
                4,
                **named,
                num_items_in_batch=items,
                logit_scale=0.5,
                final_logit_softcapping=3.0,
                lm_head_bias=bias,
            )
            found[0].backward()
        assert not (patched and found[2].requires_grad)
        numbers = [float(x) for x in found]
        runs.append((numbers, leaf.hidden.grad, leaf.weight.grad))
    assert [(spec.budget, spec.backend) for spec in calls] == [(1234, "torch")]
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(runs[1][1:], runs[0][1:], rtol=1e-4, atol=1e-6)


@only_13
@pytest.mark.parametrize("prefix", ["DPO", "KTO"])
def test_liger_losses_are_left_alone_and_it_is_said_once(prefix, tmp_path, monkeypatch, caplog):
    pytest.importorskip("liger_kernel")
    say_once.cache_clear()
    calls, path = tiny.count_calls(monkeypatch), _trainers.saved(tmp_path, "phi")
    with caplog.at_level(logging.WARNING, "fastpo"), fastpo.patched():
        _trainers.train(built(prefix, tmp_path, path, {"use_liger_kernel": True}))
    said = [r.getMessage() for r in caplog.records if r.name.startswith("fastpo")]
    assert said == [f"fastpo: {prefix}Trainer keeps its own fused loss: use_liger_kernel is True"]
    assert not calls


def test_a_head_in_another_precision_is_left_alone(tmp_path, monkeypatch, caplog):
    """`cast_lm_head_to_fp32` gives the head a forward of its own."""
    say_once.cache_clear()
    path, runs = _trainers.saved(tmp_path), []
    changes = {**SAMPLED, "cast_lm_head_to_fp32": True}
    calls = tiny.count_calls(monkeypatch)
    for patched in (False, True):
        with (
            caplog.at_level(logging.WARNING, "fastpo"),
            fastpo.patched() if patched else contextlib.nullcontext(),
        ):
            given = arguments("rewarded")
            runs.append(_trainers.train(built("GRPO", tmp_path, path, changes, **given)))
    _trainers.assert_same(runs[1], runs[0])
    said = [r.getMessage() for r in caplog.records if r.name.startswith("fastpo")]
    assert len(said) == 1 and said[0].startswith("fastpo: GRPOTrainer keeps its full logits: ")
    assert not calls


def test_an_objective_is_refused_before_anything_is_patched():
    own = utils._ChunkedLogProbFunction
    message = rf"trl: expected version 1\.15 or 1\.16, got {VERSION}"
    with pytest.raises(RuntimeError, match=message), fastpo.patched(objective="simpo"):
        pass
    assert utils._ChunkedLogProbFunction is own


@pytest.mark.parametrize(("prefix", "name"), [("DPO", "simpo"), ("KTO", "bco")])
def test_a_loss_of_ours_is_refused_by_name(prefix, name, tmp_path):
    path = _trainers.saved(tmp_path)
    message = rf"loss_type: expected .* with this trl, got .*{name}.*; .* trl 1\.15 and 1\.16"
    with fastpo.patched(), pytest.raises(RuntimeError, match=message):
        built(prefix, tmp_path, path, {"loss_type": name})
