"""TRL's distillation trainers: the same losses, metrics and parameters, without logits."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl.trainer.distillation_trainer as stable
from _tiny import one_thread  # noqa: F401
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastpo
from fastpo.integrations.lazy import cell
from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.trl import fused_pair
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


@pytest.mark.parametrize(("student", "other"), [("gemma2", "cohere"), ("cohere", "granite")])
def test_maps_of_both_heads_and_a_temperature(student, other, tmp_path, calls):
    skip_unless_served("distillation")

    def make():
        torch.manual_seed(0)
        changes = {**SAMPLED, "beta": 0.5, "temperature": 0.7}
        models = tiny.model(student), tiny.prompts(), changes
        return _trainers.build(
            "Distillation", tmp_path, *models, teacher_model=tiny.model(other, seed=1)
        )

    _trainers.assert_trains_the_same(make, calls)


@pytest.mark.parametrize("sharded", [1, 4])
def test_a_weight_that_zero_3_takes_away(sharded, calls, caplog):
    """Of student or teacher, it is gone before the backward."""
    skip_unless_served("distillation")
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 4), (9, 4), (9,), (5, 3), (9, 3), (9,))
    tensors = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]
    tensors[sharded].ds_id = 0
    say_once.cache_clear()
    found = []
    for patched in (False, True):
        with fastpo.patched() if patched else contextlib.nullcontext():
            rows = stable.ChunkedDivergenceFunction.apply(*tensors, 0.5, 0.7, 1.0, None, 1.0, 30.0)
            gradients = torch.autograd.grad(rows[0].sum(), tensors[:3])
        found.append([*rows, *gradients])
    assert all(torch.equal(ours, own) for ours, own in zip(*found, strict=True))
    assert not calls and "lm_head.weight: expected a whole tensor, got a shard" in caplog.text


MAPS = {
    "temperature": 0.7,
    "num_items_in_batch": 7,
    "student_logit_scale": 0.5,
    "teacher_logit_scale": 1.5,
    "student_final_logit_softcapping": 3.0,
    "teacher_final_logit_softcapping": 5.0,
}


def parts(mesh, dtype, taught, biased):
    """Arguments of TRL's loss, the same each time: heads in float32 shards, as FSDP2 keeps them
    beside hidden states of 16 bits; the teacher's in shards or whole."""
    g, given = torch.Generator().manual_seed(0), {}
    for side, width in {"student": 8, "teacher": 6}.items():
        given[f"{side}_hidden_states"] = torch.randn(2, 4, width, generator=g).to(dtype)
        for name, shape in {"weight": (90, width), "bias": (90,)}.items():
            x = torch.randn(shape, generator=g).bfloat16().float()  # exact in 16 bits
            if side == "student" or taught:
                x = distribute_tensor(x, mesh, [Shard(0)])
            if biased or name == "weight":
                given[f"{side}_lm_head_{name}"] = x
    leaves = [x.requires_grad_() for name, x in given.items() if name.startswith("student")]
    return {**given, "completion_mask": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])}, leaves


@pytest.mark.parametrize("options", [{}, MAPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("taught", [True, False])
def test_a_loss_of_heads_in_shards(taught, dtype, options, mesh, calls, monkeypatch):
    """In one process, where TRL's own is right; of what fastpo serves nobody gathers words."""
    skip_unless_served("distillation")
    gathered, gather = [], DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda x, **y: gathered.append(x) or gather(x, **y))
    found = []
    for patched in (False, True):
        gathered.clear()
        given, leaves = parts(mesh, dtype, taught, bool(options))
        with fastpo.patched() if patched else contextlib.nullcontext():
            loss, entropy, count = stable._chunked_divergence_loss(**given, beta=0.3, **options)
        assert fused_pair._heads.get() is None and not entropy.requires_grad
        gradients = torch.autograd.grad(loss, leaves)
        found.append([loss, entropy, count, gradients[0], *(x.to_local() for x in gradients[1:])])
    served = dtype != torch.float64
    assert bool(gathered) != served
    assert [len(student.hidden) for (student, _), *_ in calls] == [int(count)] * served
    close = {"rtol": 1e-4, "atol": 1e-6}
    if dtype == torch.bfloat16:
        close = {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(*found, **close)


def test_a_teacher_of_more_words_is_refused_beside_shards(mesh):
    """Those of the student's alone would be another teacher."""
    skip_unless_served("distillation")
    given, _ = parts(mesh, torch.float32, False, False)
    given["teacher_lm_head_weight"] = torch.zeros(91, 6)
    with fastpo.patched(), pytest.raises(ValueError, match="teacher_weight: expected"):
        stable._chunked_divergence_loss(**given, beta=0.3)
