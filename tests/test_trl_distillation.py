"""TRL's distillation trainers: the same losses, metrics and parameters, without logits."""

from __future__ import annotations

import contextlib
import importlib
from collections import defaultdict

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl.trainer.distillation_trainer as stable
from _tiny import one_thread  # noqa: F401
from accelerate import Accelerator

import fastpo
from fastpo.integrations import _lazy_logits
from fastpo.integrations._lazy_logits import LazyLogits
from fastpo.ops import _divergence

SAMPLED = {"max_completion_length": 4}


def teacher():
    return {"teacher_model": tiny.model("gemma2", seed=1)}


# name: (trainer, data, config on top, arguments of the trainer)
TRAINERS = {
    "distillation": ("Distillation", tiny.prompts, {**SAMPLED, "beta": 0.5}, teacher),
    "distillation_kl": ("Distillation", tiny.prompts, {**SAMPLED, "beta": 0.0}, teacher),
    "gkd": ("GKD", tiny.conversations, {"lmbda": 0.0, "beta": 0.3}, teacher),
    "gkd_reverse": ("GKD", tiny.conversations, {"lmbda": 0.0, "beta": 1.0}, teacher),
    "gold": ("GOLD", tiny.conversations, {"lmbda": 0.0, "use_uld_loss": False}, teacher),
}


def trainer(name, folder):
    prefix, data, changes, arguments = TRAINERS[name]
    torch.manual_seed(0)
    return _trainers.build(prefix, folder, tiny.model("llama"), data(), changes, **arguments())


def skip_unless_served(name):
    if name.startswith("distillation") and not hasattr(stable, "ChunkedDivergenceFunction"):
        pytest.skip("TRL 1.15 multiplies chunks of logits, under a checkpoint")


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every divergence."""
    seen, forward = [], _divergence.forward
    monkeypatch.setattr(_divergence, "forward", lambda *x: seen.append(x) or forward(*x))
    return seen


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_same(name, tmp_path, monkeypatch, calls):
    skip_unless_served(name)
    monkeypatch.setattr(_lazy_logits, "_told", set())
    _trainers.assert_trains_the_same(lambda: trainer(name, tmp_path), calls)
    assert len(calls) == 3
    assert not _lazy_logits._told, "nothing computes full logits"


@pytest.mark.parametrize("name", ["distillation", "gkd"])
def test_budget_and_backend_reach_the_divergence(name, tmp_path, calls):
    skip_unless_served(name)
    with fastpo.patched(budget=1234, backend="torch"):
        _trainers.train(trainer(name, tmp_path))
    assert {(spec.budget, spec.head.backend) for *_, spec in calls} == {(1234, "torch")}


def unbuilt(prefix, **attributes):
    """A trainer with these attributes and no constructor: those sample from servers and judges."""
    kind = getattr(_trainers.module(prefix), f"{prefix}Trainer")
    made = kind.__new__(kind)
    made.accelerator, made.temperature = Accelerator(cpu=True), 1.3
    vars(made).update(attributes)
    return made


READ = {
    "full": lambda m, s, t, ids: m.compute_full_logit_self_distillation_loss(
        s, t, distillation_alpha=0.3
    ),
    "topk": lambda m, s, t, ids: m.compute_topk_self_distillation_loss(
        s, t, distillation_topk=5, distillation_alpha=0.3, distillation_add_tail=True
    ),
    "sampled": lambda m, s, t, ids: m.compute_sampled_token_self_distillation_loss(
        s, t, ids, distillation_alpha=1.0
    ),
}


@pytest.mark.parametrize("mode", READ)
@pytest.mark.parametrize("prefix", ["SDPO", "SDFT"])
def test_self_distillation(prefix, mode, monkeypatch):
    """Student and teacher logits as the trainer makes them, through each of its losses."""
    monkeypatch.setattr(_lazy_logits, "_told", set())
    trainer = unbuilt(prefix, model_kwarg_keys={"logits_to_keep"})
    module = importlib.import_module(type(trainer).__module__)
    student, other = tiny.model("llama"), tiny.model("llama", seed=1)
    batch = tiny.batch()
    found = {}
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            arguments = (batch["input_ids"], torch.ones_like(batch["input_ids"]), 7)
            own = trainer._forward_logits(student, *arguments)
            with torch.no_grad():
                theirs = trainer._forward_logits(other, *arguments)
            assert isinstance(own, LazyLogits) == patched
            loss = READ[mode](module, own, theirs, batch["input_ids"][:, -7:])
        grads = torch.autograd.grad(loss.sum(), [student.lm_head.weight])
        found[patched] = (loss.detach(), *grads)
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-4)
    assert not _lazy_logits._told


@pytest.mark.parametrize("objective", ["iw_opd", "jsd", "top_k"])
def test_importance_weighted_distillation(objective, monkeypatch):
    monkeypatch.setattr(_lazy_logits, "_told", set())
    trainer = unbuilt(
        "IWOPD",
        teacher_model=tiny.model("llama", seed=1),
        use_teacher_server=False,
        distillation_objective="iw_opd" if objective == "iw_opd" else "jsd",
        beta=0.4,
        loss_top_k=3 if objective == "top_k" else 0,
        loss_add_tail=True,
        _raise_if_local_teacher_tokenizer_mismatch=lambda: None,
        _compute_prompt_length=lambda inputs: 3,
        use_liger_loss=False,  # TRL 1.13 asks
        iw_opd_gamma=0.5,
        iw_opd_epsilon=0.2,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    student, batch = tiny.model("llama"), tiny.batch()
    trainer.model = student
    found = {}
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            inputs = {**batch, "rollout_logprobs": torch.full(batch["input_ids"].shape, -3.0)}
            loss = trainer.compute_loss(student, inputs)
        found[patched] = (loss.detach(), *torch.autograd.grad(loss, [student.lm_head.weight]))
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-4)
    assert not _lazy_logits._told
