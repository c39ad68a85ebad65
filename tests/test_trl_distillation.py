"""TRL's distillation trainers: the same losses, metrics and parameters, without logits."""

from __future__ import annotations

import importlib
import warnings

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import trl
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations import _lazy_logits

SAMPLED = {"max_completion_length": 4}


def teacher():
    return {"teacher_model": tiny.model("gemma2", seed=1)}


def reward(completions, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 2) for text in texts]


def own_teacher():
    return {"reward_funcs": reward}


# name: (trainer, data, config on top, arguments of the trainer)
TRAINERS = {
    "distillation": ("Distillation", tiny.prompts, {**SAMPLED, "beta": 0.5}, teacher),
    "distillation_kl": ("Distillation", tiny.prompts, {**SAMPLED, "beta": 0.0}, teacher),
    "gkd": ("GKD", tiny.conversations, {"lmbda": 0.0, "beta": 0.3}, teacher),
    "gkd_reverse": ("GKD", tiny.conversations, {"lmbda": 0.0, "beta": 1.0}, teacher),
    "gold": ("GOLD", tiny.conversations, {"lmbda": 0.0, "use_uld_loss": False}, teacher),
}
MODULES = {"GKD": "gkd", "GOLD": "gold", "SDPO": "sdpo", "SDFT": "sdft"}
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
    monkeypatch.setattr(_lazy_logits, "_told", set())
    own_logs, own = trained(name, tmp_path)
    with fastpo.patched():
        logs, ours = trained(name, tmp_path)
    assert not _lazy_logits._told, "nothing computes full logits"
    assert len(logs) == len(own_logs) == 4
    for log, own_log in zip(logs, own_logs, strict=True):
        assert log == pytest.approx(own_log, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
