"""TRL's distillation trainers: the same losses, metrics and parameters, without logits."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl.trainer.distillation_trainer as stable
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.lazy import cell
from fastpo.ops.walks import divergence

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
    seen, forward = [], divergence.forward
    monkeypatch.setattr(divergence, "forward", lambda *x: seen.append(x) or forward(*x))
    return seen


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_same(name, tmp_path, monkeypatch, calls):
    skip_unless_served(name)
    monkeypatch.setattr(cell, "told", set())
    _trainers.assert_trains_the_same(lambda: trainer(name, tmp_path), calls)
    assert len(calls) == 3
    assert not cell.told, "nothing computes full logits"


@pytest.mark.parametrize("name", ["distillation", "gkd"])
def test_budget_and_backend_reach_the_divergence(name, tmp_path, calls):
    skip_unless_served(name)
    with fastpo.patched(budget=1234, backend="torch"):
        _trainers.train(trainer(name, tmp_path))
    assert {(spec.budget, spec.head.backend) for *_, spec in calls} == {(1234, "torch")}
