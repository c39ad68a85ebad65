"""TRL's trainers on models and under defaults of other dtypes: what fastpo has no kernels for."""

from __future__ import annotations

import contextlib
import inspect

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl.trainer.utils as utils
from _tiny import one_thread  # noqa: F401
from trl.trainer import distillation_trainer

import fastpo
from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.trl.objectives.columns import PAIRS, Carry

SAMPLED = {"max_completion_length": 4}
GROUPS = {**SAMPLED, "num_generations": 2}


def double(seed=0):
    return tiny.model("llama", seed=seed).double()


def reference():
    return {"ref_model": double()}


def rewards():
    return {"reward_funcs": _trainers.reward}


def teacher():
    return {"teacher_model": double(seed=1)}


SERVED = "float32, bfloat16 or float16"
FUSED = "outputs" in inspect.signature(utils._ChunkedLogProbFunction.forward).parameters
fused = pytest.mark.skipif(not FUSED, reason="TRL 1.15 is the first with a fused head")
# name: (trainer, data, config on top, arguments of the trainer)
TRAINERS = {
    "dpo": ("DPO", tiny.preferences, {"loss_type": ["sigmoid", "sft"]}, reference),
    "kto": ("KTO", tiny.unpaired, {}, reference),
    "sft": ("SFT", tiny.conversations, {}, dict),
    "grpo": ("GRPO", tiny.prompts, {**GROUPS, "entropy_coef": 0.1}, rewards),
    "cpo": ("CPO", tiny.preferences, {}, dict),
    "distillation": ("Distillation", tiny.prompts, {**SAMPLED, "beta": 0.5}, teacher),
    "gkd": ("GKD", tiny.conversations, {"lmbda": 0.0}, teacher),
}


def run(name, folder):
    prefix, data, changes, arguments = TRAINERS[name]
    changes = {"max_steps": 2, **changes}
    built = _trainers.build(prefix, folder, double(), data(), changes, **arguments())
    return _trainers.train(built)


def left_to_trl(name):
    """What a seam says; TRL before 1.16 has none for its Distillation."""
    if name == "distillation":
        has_seam = hasattr(distillation_trainer, "ChunkedDivergenceFunction")
        return "DistillationTrainer keeps its own divergence: student_hidden" if has_seam else None
    if FUSED and name in ("dpo", "kto", "sft", "grpo"):
        return "TRL keeps its own head: hidden"
    return f"{TRAINERS[name][0]}Trainer keeps its full logits: lm_head.weight"


@pytest.mark.parametrize("name", TRAINERS)
def test_float64_models_train_the_same(name, tmp_path, monkeypatch, caplog):
    """On TRL's own head; a word says so once."""
    calls = tiny.count_calls(monkeypatch)
    say_once.cache_clear()
    own = run(name, tmp_path)
    with fastpo.patched():
        ours = run(name, tmp_path)
    assert not calls
    _trainers.assert_same(ours, own)
    left = left_to_trl(name)
    if left is not None:
        said = f"fastpo: {left}: expected dtype {SERVED}, got torch.float64"
        assert [record.message for record in caplog.records].count(said) == 1


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXED = [(h, w) for h in DTYPES for w in DTYPES if torch.float64 in (h, w)]


@fused
@pytest.mark.parametrize(("of_hidden", "of_weight"), MIXED)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_float64_operand_is_left_to_trl(of_hidden, of_weight, autocast):
    """Bit for bit, hidden states and weights of any dtype beside each other."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 8), torch.randn(40, 8), torch.randn(40)
    labels = torch.randint(0, 40, (5,))

    def found():
        leaves = [hidden.to(of_hidden), weight.to(of_weight), bias.to(of_weight)]
        for leaf in leaves:
            leaf.requires_grad_()
        options = (1.5, 32768, 3.0, 0.7, ("entropy", "mean_logits"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = utils._ChunkedLogProbFunction.apply(*leaves, labels, *options)
        (results[0] + results[1]).sum().backward()
        return [*results, *(leaf.grad for leaf in leaves)]

    own = found()
    with fastpo.patched():
        ours = found()
    assert all(a is b or torch.equal(a, b) for a, b in zip(ours, own, strict=True))


@fused
def test_an_adapter_on_a_float64_head_is_refused(tmp_path):
    """TRL's own head would ignore it."""
    adapter = _trainers.lora(target_modules=["q_proj", "lm_head"])
    with fastpo.patched(), pytest.raises(ValueError, match="lm_head"):
        _trainers.build(
            "DPO", tmp_path, double(), tiny.preferences(), {}, **reference(), peft_config=adapter
        )


@contextlib.contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# Losses that TRL has, too: (trainer, data, TRL's name, fastpo's, hyperparameters)
TWINS = {
    "dpo": ("DPO", tiny.preferences, "sigmoid", "dpo", {}),
    "kto": ("KTO", tiny.unpaired, "kto", "kto", {"beta": 0.1}),
}


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TWINS)
def test_an_objective_by_name_under_another_default_dtype(name, dtype, tmp_path):
    """TRL's own metrics and parameters; transformers logs its loss in the default dtype."""
    prefix, data, loss, key, hyperparameters = TWINS[name]

    def run(**changes):
        models = {"model": tiny.model(), "ref_model": tiny.model(seed=1)}
        with default(dtype):
            return _trainers.train(
                _trainers.build(prefix, tmp_path, data=data(), changes=changes, **models)
            )

    own = run(loss_type=loss)
    with fastpo.patched(objective=key, **hyperparameters):
        ours = run()
    _trainers.assert_same(ours, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_columns_under_another_default_dtype(dtype):
    ids = {"input_ids": torch.ones(4, 3, dtype=torch.int64)}
    rows = [{"margins": 1 + 2**-20, "ties": True, "chosen_lengths": 3}] * 2
    carry = Carry(lambda examples: dict(ids), list(rows[0]), PAIRS)
    with default(dtype):
        batch = carry(rows)
    assert batch["margins"].dtype == torch.float32
    assert batch["margins"].tolist() == [1 + 2**-20] * 2
    assert (batch["ties"].dtype, batch["chosen_lengths"].dtype) == (torch.bool, torch.int64)
