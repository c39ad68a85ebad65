"""TRL's distillation trainers: the same losses, metrics and parameters, without logits."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections import defaultdict

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import trl
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
MODULES = {"GKD": "gkd", "GOLD": "gold", "SDPO": "sdpo", "SDFT": "sdft", "IWOPD": "iw_opd"}
TIMINGS = ("runtime", "per_second", "step_time")


def classes(prefix):
    if hasattr(trl, f"{prefix}Trainer"):
        return getattr(trl, f"{prefix}Trainer"), getattr(trl, f"{prefix}Config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's notice that its experiments may change
        module = importlib.import_module(f"trl.experimental.{MODULES[prefix]}")
    return getattr(module, f"{prefix}Trainer"), getattr(module, f"{prefix}Config")


def trained(name, folder):
    prefix, data, changes, arguments = TRAINERS[name]
    kind, config = classes(prefix)
    torch.manual_seed(0)
    built = kind(
        model=tiny.model("llama"),
        args=config(
            output_dir=str(folder),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **changes,
        ),
        train_dataset=data(),
        processing_class=tiny.tokenizer(),
        **arguments(),
    )
    built.train()
    logs = [
        {key: value for key, value in log.items() if not key.endswith(TIMINGS)}
        for log in built.state.log_history
    ]
    return logs, {n: p.detach().clone() for n, p in built.model.named_parameters()}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_same(name, tmp_path, monkeypatch):
    if name.startswith("distillation") and not hasattr(stable, "ChunkedDivergenceFunction"):
        pytest.skip("TRL 1.15 multiplies chunks of logits, under a checkpoint")
    monkeypatch.setattr(_lazy_logits, "_told", set())
    own_logs, own = trained(name, tmp_path)
    calls = []
    forward = _divergence.forward
    monkeypatch.setattr(_divergence, "forward", lambda *x: calls.append(x) or forward(*x))
    with fastpo.patched():
        logs, ours = trained(name, tmp_path)
    assert len(calls) == 3
    assert not _lazy_logits._told, "nothing computes full logits"
    assert len(logs) == len(own_logs) == 4
    for log, own_log in zip(logs, own_logs, strict=True):
        assert log == pytest.approx(own_log, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def unbuilt(prefix, **attributes):
    """A trainer with these attributes and no constructor: those sample from servers and judges."""
    kind, _ = classes(prefix)
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
