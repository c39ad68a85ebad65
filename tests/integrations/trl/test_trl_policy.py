"""Objectives of policy gradient by name in TRL's GRPOTrainer, and who is told that it has none."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
from _tiny import one_thread  # noqa: F401
from trl import GRPOTrainer

import fastpo
from fastpo.integrations.seams.saying import say_once
from fastpo.integrations.trl.objectives.by_name import objectives_only
from fastpo.integrations.trl.objectives.setting import Setting

TWICE = {"num_generations": 2, "max_completion_length": 6, "num_iterations": 2, "max_steps": 4}
ACCUMULATED = {"gradient_accumulation_steps": 2}
# TRL's loss type and options, our hyperparameters, options of both.
SAME = {
    "grpo": ("grpo", {"beta": 0.1}, {"beta": 0.1, "unbiased_kl": True}, {}),
    "biased": ("grpo", {"beta": 0.1, "use_bias_correction_kl": False}, {"beta": 0.1}, {}),
    "sequences": ("grpo", {"importance_sampling_level": "sequence"}, {"level": "sequence"}, {}),
    "dapo": (
        "dapo",
        {"entropy_coef": 0.1},
        {"entropy_coef": 0.1, "epsilon_high": None},
        ACCUMULATED,
    ),
    "bnpo": ("bnpo", {"delta": 1.5}, {"delta": 1.5}, {"off_policy_mask_threshold": 0.01}),
    "dr_grpo": ("dr_grpo", {"epsilon_high": 0.3}, {"epsilon_high": 0.3}, ACCUMULATED),
    "luspo": ("luspo", {"importance_sampling_level": "sequence"}, {}, {}),
    "cispo": ("cispo", {"epsilon_high": 5.0}, {}, {"top_entropy_quantile": 0.5}),
    "sapo": ("sapo", {"sapo_temperature_neg": 1.2}, {"temperature_neg": 1.2}, {}),
    "vespo": ("vespo", {}, {}, {"top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.01}),
}
# Metrics of TRL's own loss types, which an objective of another form has not.
OF_A_LOSS = ("cispo_clip_ratio", "vespo", "policy_loss", "entropy_coef")


def trainer(folder, model="llama", kind="GRPO", **changes):
    evaluated = (
        {"eval_dataset": tiny.prompts().select(range(2))} if changes.get("eval_steps") else {}
    )
    return _trainers.build(
        kind,
        folder,
        _trainers.saved(folder, model),
        tiny.prompts(),
        {**TWICE, **changes},
        reward_funcs=_trainers.reward,
        **evaluated,
    )


def without(run):
    logs, parameters = run
    kept = [{k: v for k, v in log.items() if not k.startswith(OF_A_LOSS)} for log in logs]
    return kept, parameters


@pytest.mark.parametrize("name", SAME)
def test_an_objective_trains_as_trls_loss_does(name, tmp_path):
    loss_type, theirs, hyperparameters, both = SAME[name]
    expected = _trainers.train(trainer(tmp_path, loss_type=loss_type, **theirs, **both))
    with fastpo.patched(objective=loss_type, **hyperparameters):
        found = _trainers.train(trainer(tmp_path, **both))
    _trainers.assert_same(without(found), without(expected))


def test_what_the_config_says_again(tmp_path, caplog):
    """It is neither refused nor heard twice; of TRL's own loss nothing is logged or warned of."""
    both = {"beta": 0.1, "entropy_coef": 0.1, "importance_sampling_level": "sequence"}
    expected = _trainers.train(trainer(tmp_path, loss_type="grpo", **both))
    given = {"beta": 0.1, "entropy_coef": 0.1, "level": "sequence", "unbiased_kl": True}
    with fastpo.patched(objective="grpo", **given):
        own = trainer(tmp_path, **both)
        assert own.beta == 0.1
        found = _trainers.train(own)
    _trainers.assert_same(without(found), without(expected))
    assert not any("policy_loss" in log for log in found[0])
    assert "importance_sampling_level" not in caplog.text


EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 2,
    "num_generations_eval": 2,
}


def test_evaluation_accumulates_nothing(tmp_path):
    both, penalties = {**EVALUATED, **ACCUMULATED}, {"beta": 1.0, "entropy_coef": 0.1}
    own = trainer(tmp_path, loss_type="dapo", epsilon_high=0.28, **penalties, **both)
    own = _trainers.train(own)
    with objectives_only(Setting("dapo", {**penalties, "unbiased_kl": True})):
        found = _trainers.train(trainer(tmp_path, **both))
    losses = [[log["eval_loss"] for log in run[0] if "eval_loss" in log] for run in (found, own)]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluation_and_the_loss_of_a_router(tmp_path):
    router = {"model_init_kwargs": {"output_router_logits": True}, "router_aux_loss_coef": 0.1}
    both = {**EVALUATED, **router}
    expected = trainer(tmp_path, "qwen2_moe", loss_type="dapo", epsilon_high=0.28, **both)
    assert expected.aux_loss_enabled
    own = _trainers.train(expected)
    with objectives_only(Setting("dapo")):  # the head of both is TRL's
        found = _trainers.train(trainer(tmp_path, "qwen2_moe", **both))
    assert any("eval_loss" in log for log in found[0]) and any("aux_loss" in x for x in found[0])
    _trainers.assert_same(found, own)


def batch(trainer):
    """A batch as it is generated, with numbers of another sampler's."""
    trainer.model.train()
    made = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    g = torch.Generator().manual_seed(0)
    shape = made["completion_ids"].shape
    made["tool_mask"] = torch.rand(shape, generator=g).gt(0.3).int()
    scored = (made["completion_mask"] * made["tool_mask"]).bool()
    ratio = 0.5 + torch.rand(shape, generator=g)
    made["importance_sampling_ratio"] = torch.where(scored, ratio, 1.0)  # as TRL makes it
    made["advantages"] = torch.tensor([1.0, -0.5])
    return made


@pytest.mark.parametrize("corrects", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "vespo", "dr_grpo"])
def test_weights_of_a_sampler_and_tokens_of_tools(loss_type, corrects, tmp_path):
    losses, gradients = [], []
    for objective in (None, loss_type):
        options = {} if objective is None else {"objective": objective}
        if objective in ("dapo", "dr_grpo"):
            options["epsilon_high"] = None
        with fastpo.patched(**options):
            one = trainer(tmp_path, **({"loss_type": loss_type} if objective is None else {}))
            torch.manual_seed(0)
            given = batch(one)
            if not corrects:
                del given["importance_sampling_ratio"]
            one.use_vllm, one.vllm_importance_sampling_correction = True, corrects
            one.max_completion_length += 3  # of which dr_grpo takes the mean
            one.current_gradient_accumulation_steps = 1
            loss = one._compute_loss(one.model, given)
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss, one.model.lm_head.weight)[0])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].abs().max() > 0


def test_a_samplers_log_probabilities_are_an_objectives_to_read(tmp_path):
    def objective(token_logps, sampler_token_logps):
        return (0 * token_logps + sampler_token_logps).sum(1)

    with fastpo.patched(objective=objective):
        one = trainer(tmp_path)
        given = batch(one)
        given["sampling_per_token_logps"] = torch.full(given["completion_ids"].shape, -2.0)
        one.current_gradient_accumulation_steps = 1
        assert one._compute_loss(one.model, given) == -2.0 * given["completion_ids"].shape[1]


def test_a_key_in_the_config_takes_its_options(tmp_path):
    """What TRL has no loss type for."""
    changes = {"epsilon": 0.01, "beta": 0.1}
    with fastpo.patched():
        named = _trainers.train(trainer(tmp_path, loss_type="gmpo", **changes))
        (term,) = trainer(tmp_path, loss_type="gspo", epsilon=0.1)._fastpo.terms
    assert term.parameters["epsilon_high"] is None  # as epsilon, not the paper's 0.0004
    with fastpo.patched(objective="gmpo", epsilon_low=0.01, beta=0.1):
        given = _trainers.train(trainer(tmp_path))
    _trainers.assert_same(named, given)
    with fastpo.patched(objective="gmpo", beta=0.1):
        other = _trainers.train(trainer(tmp_path))
    assert any(not torch.equal(other[1][name], x) for name, x in given[1].items())


def test_a_function_of_ones_own_is_called_with_batches_alone(tmp_path):
    rows = []

    def reinforce(token_logps, mask, advantages):
        rows.append(len(mask))
        return -(advantages[:, None] * token_logps * mask).sum(1) / mask.sum(1)

    with fastpo.patched(objective=reinforce):
        own = trainer(tmp_path)
        assert rows == []
        found = _trainers.train(own)
    assert rows == [2, 2, 2, 2]
    with fastpo.patched(objective="reinforce", reduction="mean"):
        expected = _trainers.train(trainer(tmp_path))
    _trainers.assert_same(found, expected)


def test_a_scripts_own_loss_stands_around_the_objective(tmp_path):
    class Halved(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            assert model.training
            return super()._compute_loss(model, inputs) / 2

    def built(kind):
        return kind(
            model=_trainers.saved(tmp_path),
            reward_funcs=_trainers.reward,
            args=_trainers.config("GRPO", tmp_path, TWICE),
            train_dataset=tiny.prompts(),
            processing_class=tiny.tokenizer(),
        )

    with fastpo.patched(objective="gspo"):
        whole, half = (_trainers.train(built(kind))[0] for kind in (GRPOTrainer, Halved))
    assert half[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"] / 2, rel=1e-4)
    assert isinstance(built(Halved), Halved)


def halved(self, *args, **kwargs):
    logps, *rest = GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)
    return logps * 0.5, *rest


def chosen(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold):
    return (advantages >= 0).to(mask.dtype)


def every_other(self, entropies, mask, threshold):
    return mask.bool() & (torch.arange(mask.shape[1]) % 2 == 0)


# What a script's own class makes of the scores and masks, which the loss is of.
OWN_METHODS = {
    "_get_per_token_logps_and_entropies": (halved, {}),
    "get_off_policy_mask": (staticmethod(chosen), {"off_policy_mask_threshold": 0.01}),
    "get_high_entropy_mask": (every_other, {"top_entropy_quantile": 0.5}),
}


@pytest.mark.parametrize("name", OWN_METHODS)
def test_scores_and_masks_of_a_script(name, tmp_path, monkeypatch):
    method, changes = OWN_METHODS[name]
    kind = type("Own", (GRPOTrainer,), {name: method, "__module__": "script"})
    monkeypatch.setattr(_trainers.module("GRPO"), "GRPOTrainer", kind)
    expected = _trainers.train(trainer(tmp_path, loss_type="grpo", **changes))
    with fastpo.patched(objective="grpo"):
        found = _trainers.train(trainer(tmp_path, **changes))
    _trainers.assert_same(without(found), without(expected))


def test_names_of_a_script_are_its_own(tmp_path, monkeypatch):
    class Counting(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.step, self.terms, self.setting, self.needs, self._loss = 0, 1, 2, 3, 4

        def training_step(self, *args, **kwargs):
            self.step += 1
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(_trainers.module("GRPO"), "GRPOTrainer", Counting)
    with fastpo.patched(objective="gspo"):
        counting = trainer(tmp_path)
        counting.train()
    assert counting.step == 4


def test_a_loss_that_goes_past_the_objective_is_an_error(tmp_path, monkeypatch):
    class Past(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return GRPOTrainer._compute_loss(self, model, inputs)

    monkeypatch.setattr(_trainers.module("GRPO"), "GRPOTrainer", Past)
    with fastpo.patched(objective="rloo"):
        past = trainer(tmp_path)
        with pytest.raises(RuntimeError, match=r"Past._compute_loss: expected a call of super\(\)"):
            past.train()


def test_a_constructor_that_is_wrapped_after_the_patch(tmp_path, monkeypatch):
    """As tools that watch a training do."""
    with fastpo.patched(objective="gspo"):
        own = GRPOTrainer.__init__
        monkeypatch.setattr(GRPOTrainer, "__init__", lambda *a, **k: own(*a, **k))
        found = _trainers.train(trainer(tmp_path))
        monkeypatch.undo()
        expected = _trainers.train(trainer(tmp_path))
    _trainers.assert_same(found, expected)


REFUSED = {
    "epsilon": (
        {"objective": "gspo"},
        {"epsilon": 0.1},
        r"epsilon: expected 0.2 with gspo \(give epsilon_low= to fastpo.patch\), got 0.1",
    ),
    "beta": ({"objective": "rloo"}, {"beta": 0.1}, r"beta: expected 0.0 with rloo, got 0.1"),
    "beta of 1": ({"objective": "rloo"}, {"beta": 1.0}, r"beta: expected 0.0 with rloo, got 1.0"),
    "adaptive": (
        {"objective": "grpo"},
        {"use_adaptive_entropy": True},
        "use_adaptive_entropy: expected False with grpo",
    ),
    "weights": (
        {"objective": "gmpo"},
        {"top_entropy_quantile": 0.5},
        "top_entropy_quantile: expected none with gmpo, which has no is_weights, got 0.5",
    ),
    "sampler": (
        {"objective": "gmpo"},
        {"use_vllm": True},
        "vllm_importance_sampling_correction: expected none with gmpo, which has no is_weights",
    ),
    "row of a sampler": (
        {"objective": "vespo"},
        {"use_vllm": True},
        "vllm_importance_sampling_mode: expected token_truncate or token_mask with vespo, got seq",
    ),
    "values": ({"objective": "ppo_value"}, {}, "ppo_value: expected an objective of what GRPO"),
    "own": (
        {"objective": lambda logps, advantages: -logps * advantages},
        {},
        "<lambda>: expected an objective of what GRPOTrainer has, .* got one of logps",
    ),
    "misspelt": (
        {"objective": lambda token_logps, advantage: -token_logps.sum(1) * advantage},
        {},
        "objective: expected parameters named as quantities are, got advantage",
    ),
    "prompts": (
        {"objective": "gspo", "score_prompts": True},
        {},
        "score_prompts: expected False with GRPOTrainer, got True",
    ),
    "loss_type": ({"objective": "gspo"}, {"loss_type": "grpo"}, "loss_type: expected the default"),
    "unknown": ({}, {"loss_type": "nope"}, "nope"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_so_is_refused(name, tmp_path):
    options, changes, message = REFUSED[name]
    with fastpo.patched(**options), pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "bt",
            "bt: expected an objective of pairs, tokens, singles, policy_gradient, got one of re",
        ),
        ("length_normalize", "got one of transforms"),
        ("infonca", "got one of groups; fastpo.GroupTrainer takes it"),
    ],
)
def test_what_no_trainer_takes_is_refused_at_once(key, message):
    with pytest.raises(ValueError, match=message):
        fastpo.patch(objective=key)


def of_pairs(chosen_logps, rejected_logps):
    """A function of what GRPOTrainer has not."""


@pytest.mark.parametrize(
    ("kind", "objective", "taking"),
    [
        ("SFT", "gspo", "GRPOTrainer"),
        ("GMPO", "gspo", "GRPOTrainer"),
        ("GRPO", "simpo", "DPOTrainer"),
        ("GRPO", of_pairs, "DPOTrainer, KTOTrainer"),
    ],
)
def test_another_trainer_says_that_its_loss_is_its_own(kind, objective, taking, tmp_path, caplog):
    changes = {} if kind == "SFT" else TWICE
    given = {} if kind == "SFT" else {"reward_funcs": _trainers.reward}
    runs = []
    for options in ({"objective": objective}, {}):
        with fastpo.patched(**options), caplog.at_level(logging.WARNING, "fastpo"):
            path = _trainers.saved(tmp_path)
            data = _trainers.DATA[kind]()
            say_once.cache_clear()
            runs.append(
                _trainers.train(_trainers.build(kind, tmp_path, path, data, changes, **given))
            )
    _trainers.assert_same(*runs)
    (said,) = [
        record.getMessage() for record in caplog.records if "own loss" in record.getMessage()
    ]
    own = f"fastpo: {kind}Trainer: it trains its own loss"
    assert said == f"{own}; patch(objective=...) is taken by {taking}"
