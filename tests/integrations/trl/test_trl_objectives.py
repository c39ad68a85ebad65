"""`fastpo.patch(objective=...)` and `loss_type` by name, in TRL's DPOTrainer and KTOTrainer."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl
import trl.trainer.utils as utils
from _tiny import one_thread  # noqa: F401
from trl.trainer.dpo_trainer import DataCollatorForPreference

import fastpo
from fastpo import objectives
from fastpo.integrations.seams import imports
from fastpo.integrations.trl.objectives.by_name import objectives_only
from fastpo.integrations.trl.objectives.columns import PAIRS, Carry
from fastpo.integrations.trl.objectives.setting import Setting
from fastpo.objectives._quantities import SHAPES
from fastpo.quantities import Quantities


def trainer(prefix, folder, *, data=None, **options):
    """`ref_model` goes to the trainer, everything else to its config."""
    given = {"ref_model": options.pop("ref_model", None)}
    rows = _trainers.DATA[prefix]() if data is None else data
    return _trainers.build(prefix, folder, _trainers.saved(folder), rows, options, **given)


SAME = {
    "sigmoid": ("DPO", {}, "dpo", {}),
    "ipo": ("DPO", {"beta": 0.5}, "ipo_norm", {"beta": 0.5}),
    "aot": ("DPO", {"label_smoothing": 0.1}, "aot", {"label_smoothing": 0.1}),
    "sft": ("DPO", {}, "sft", {}),
    "sppo_hard": ("DPO", {"beta": 1.0}, "sppo_hard", {"beta": 1.0}),
    "kto": (
        "KTO",
        {"undesirable_weight": 0.7},
        "kto",
        {"beta": 0.1, "undesirable_weight": 0.7},
    ),
    "apo_zero_unpaired": ("KTO", {}, "kto_apo_zero", {"beta": 0.1}),
}


@pytest.mark.parametrize("loss_type", SAME)
def test_an_objective_trains_as_trl_does(loss_type, tmp_path):
    """TRL's own loss and ours under the same name: losses, metrics and parameters."""
    prefix, changes, key, hyperparameters = SAME[loss_type]
    own_trainer = trainer(prefix, tmp_path, loss_type=loss_type, **changes)
    expected_logs, expected = _trainers.train(own_trainer)
    changes = {name: value for name, value in changes.items() if name not in hyperparameters}
    with fastpo.patched(objective=key, **hyperparameters):
        logs, ours = _trainers.train(trainer(prefix, tmp_path, **changes))
    for log, own in zip(logs, expected_logs, strict=True):
        if loss_type == "sft":  # no reference is asked for, so the rewards are those without one
            own = {name: value for name, value in own.items() if "rewards" not in name}
        assert {name: log[name] for name in own} == pytest.approx(own, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def naive(model, ids, mask):
    """Token log-probabilities [R, T] and log-softmax [R, T, V] of full logits."""
    attention = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].double()
    log_p = logits.log_softmax(-1)
    found = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(mask, found, 0.0), log_p


def pair_quantities(batch, policy, reference, columns):
    """All the quantities of a DPO batch, by the book."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    tokens, log_p = naive(policy, ids, mask)
    with torch.no_grad():
        ref_tokens, ref_log_p = naive(reference, ids, mask)
    kl = (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1)
    by_kind = {
        "token_logps": tokens,
        "mask": mask,
        "lengths": mask.sum(1),
        "logps": tokens.sum(1),
        "logratios": tokens.sum(1) - ref_tokens.sum(1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "token_kl": kl,
    }
    found = dict(columns)
    for i, side in enumerate(("chosen", "rejected")):
        found |= {f"{side}_{kind}": x.chunk(2)[i] for kind, x in by_kind.items()}
        found[f"ref_{side}_token_logps"] = ref_tokens.chunk(2)[i]
        found[f"ref_{side}_logps"] = ref_tokens.chunk(2)[i].sum(1)
    return found


def scores(rows):
    g = torch.Generator().manual_seed(1)
    return {f"{side}_scores": torch.rand(rows, generator=g).tolist() for side in SIDES}


def per_token(kind, draw):
    """A column of that kind per side, with one value per token of the completion."""

    def columns(rows):
        g = torch.Generator().manual_seed(2)
        lengths = tokenized()
        return {f"{side}_{kind}": [draw(n, g) for n in lengths[f"{side}_ids"]] for side in SIDES}

    return columns


def weights(length, generator):
    return torch.rand(length, generator=generator).tolist()


def segments(length, generator):
    return torch.randint(-1, 2, (length,), generator=generator).sort().values.tolist()


def some(length, generator):
    return (torch.rand(length, generator=generator) < 0.7).tolist()


def history(rows):
    g = torch.Generator().manual_seed(3)
    return {
        f"history_{side}_logps": (-20 * torch.rand(rows, 2, generator=g)).tolist() for side in SIDES
    }


def third(rows):
    return {"third": [[{"role": "assistant", "content": text}] for text in tiny.GOOD[::-1]]}


def unlabeled(rows):
    return {"unlabeled": third(rows)["third"]}


@functools.cache
def tokenized():
    """Lengths of the completions as TRL tokenizes them."""
    with tempfile.TemporaryDirectory() as folder:
        data = trainer("DPO", Path(folder)).train_dataset
    return {name: [len(ids) for ids in data[name]] for name in ("chosen_ids", "rejected_ids")}


SIDES = ("chosen", "rejected")
# key: (hyperparameters, columns)
OBJECTIVES = {
    "simpo": ({}, None),
    "orpo": ({}, None),
    "cpo": ({"label_smoothing": 0.1}, None),
    "dpo": ({"beta": 0.3}, lambda rows: {"soft_labels": [0.1 * i for i in range(rows)]}),
    "hinge": ({}, lambda rows: {"pair_weights": [0.3 * i for i in range(rows)]}),
    "odpo": ({}, scores),
    "wpo": ({}, None),
    "ld_dpo": ({}, None),
    "mask_dpo": ({}, per_token("token_weights", weights)),
    "rrpo": ({}, per_token("segments", segments)),
    "exo_pair": ({}, per_token("mask", some)),
    "mrpo": ({}, history),
    "rationale_dpo": ({}, third),
    "tpo_triple": ({}, third),
    "vpo": ({}, third),
    "sspo": ({}, unlabeled),
    "tdpo": ({}, None),
}


@pytest.mark.parametrize("key", OBJECTIVES)
def test_the_loss_is_that_of_full_logits(key, tmp_path):
    """One batch through the trainer against log-softmax in float64 and the objective's own rows."""
    hyperparameters, make = OBJECTIVES[key]
    data = tiny.preferences()
    for name, values in (make(len(data)) if make else {}).items():
        data = data.add_column(name, values)
    reference = tiny.model("llama", seed=1)
    with fastpo.patched(objective=key, **hyperparameters):
        built = trainer("DPO", tmp_path, data=data, ref_model=reference)
        batch = next(iter(built.get_train_dataloader()))
        loss = built.compute_loss(built.model, dict(batch))
    loss.backward()
    gradient = built.model.lm_head.weight.grad.clone()
    built.model.zero_grad()
    policy = built.model.double()
    expected = by_the_book(key, hyperparameters, batch, policy, reference.double())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient.double(), policy.lm_head.weight.grad, rtol=1e-3, atol=1e-6)


def by_the_book(key, hyperparameters, batch, policy, reference):
    columns = {name: x for name, x in batch.items() if name in SHAPES}
    given = pair_quantities(batch, policy, reference, columns)
    for text in ("third", "unlabeled"):
        if f"{text}_input_ids" in batch:
            ids, mask = batch[f"{text}_input_ids"], batch[f"{text}_completion_mask"][:, 1:].bool()
            given[f"{text}_logps"] = naive(policy, ids, mask)[0].sum(1)
            given[f"ref_{text}_logps"] = naive(reference, ids, mask)[0].sum(1)
            given[f"{text}_lengths"] = mask.sum(1)
    return Quantities(given).rows(objectives.get(key, **hyperparameters)).mean()


def test_a_mixture_of_policy_and_reference(tmp_path):
    """spa: log-probabilities under softmax(1.5·policy - 0.5·reference)."""
    reference = tiny.model("llama", seed=1)
    with fastpo.patched(objective="spa", mixing=1.5):
        built = trainer("DPO", tmp_path, ref_model=reference)
        batch = next(iter(built.get_train_dataloader()))
        loss = built.compute_loss(built.model, dict(batch))
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    heads = [naive(model, ids, mask)[1] for model in (built.model.double(), reference.double())]
    mixture = (1.5 * heads[0] - 0.5 * heads[1]).log_softmax(-1)
    sums = (mixture.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask).sum(1).chunk(2)
    columns = {f"mixed_{side}_logps": x for side, x in zip(SIDES, sums, strict=True)}
    given = pair_quantities(batch, built.model, reference, columns)
    expected = Quantities(given).rows(objectives.get("spa")).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_another_token_of_the_best_is_drawn(tmp_path):
    """pairwise_cringe with one alternative: the best token that is not the one written."""
    with fastpo.patched(objective="pairwise_cringe", alternatives=1):
        built = trainer("DPO", tmp_path)
        batch = next(iter(built.get_train_dataloader()))
        loss = built.compute_loss(built.model, dict(batch))
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    _, log_p = naive(built.model.double(), ids, mask)
    best = log_p.scatter(-1, ids[:, 1:, None], -torch.inf).amax(-1).chunk(2)[1]
    columns = {"rejected_alternative_token_logps": best}
    given = pair_quantities(batch, built.model, built.model, columns)
    expected = Quantities(given).rows(objectives.get("pairwise_cringe")).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("length", [None, 3, 6])
def test_token_columns_go_where_their_tokens_go(mode, length):
    examples = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [11, 12, 13, 14], "rejected_ids": [21]},
        {"prompt_ids": [4], "chosen_ids": [15], "rejected_ids": [22, 23, 24, 25, 26, 27]},
    ]
    for example in examples:
        for side in SIDES:
            example[f"{side}_token_weights"] = [float(i) for i in example[f"{side}_ids"]]
    collator = DataCollatorForPreference(pad_token_id=0, max_length=length, truncation_mode=mode)
    names = [f"{side}_token_weights" for side in SIDES]
    batch = Carry(collator, names, PAIRS)(examples)
    scored = (batch["input_ids"] * batch["completion_mask"])[:, 1:].float()
    torch.testing.assert_close(torch.cat([batch[name] for name in names]), scored)


def test_a_config_names_an_objective_and_no_reference_is_loaded(tmp_path):
    own = trainer("DPO", tmp_path)
    with fastpo.patched():
        built = trainer("DPO", tmp_path, loss_type=["simpo", "sft"], loss_weights=[1.0, 0.5])
        assert type(built).__name__ == "DPOTrainer" and isinstance(built, trl.DPOTrainer)
        assert built.ref_model is not None, "TRL's sft stays TRL's, and logs rewards"
        alone = trainer("DPO", tmp_path, loss_type="simpo")
        assert alone.ref_model is None
        assert alone.args.precompute_ref_log_probs is False
        logs, _ = _trainers.train(alone)
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in logs[:3])
    assert {"rewards/chosen", "logps/chosen", "logits/chosen", "entropy"} <= set(logs[0])
    assert type(own) is trl.DPOTrainer


def test_trl_owns_its_names(tmp_path):
    with fastpo.patched():
        assert type(trainer("DPO", tmp_path, loss_type="ipo")) is trl.DPOTrainer
        assert type(trainer("KTO", tmp_path)) is trl.KTOTrainer


ERRORS = {
    "odpo": (r"chosen_scores: expected a dataset column 'chosen_scores'", {}),
    "rationale_dpo": (r"third_logps: expected a dataset column 'third' with a text", {}),
    "mnpo": (r"history_chosen_logps: expected a dataset column .* or references=", {}),
    "mask_dpo": (r"chosen_token_weights: .*one list per row, a number for every token", {}),
    "kto": (r"kto: expected an objective of pairs or tokens, got singles", {}),
    "spa": (r"mixed_chosen_logps: expected mixing=m in fastpo.patch", {}),
    "no_such": (r"objective: expected one of .*, got 'no_such'", {}),
    "simpo": (r"use_weighting: expected False with simpo", {"use_weighting": True}),
}


@pytest.mark.parametrize("key", ERRORS)
def test_what_is_missing_is_named(key, tmp_path):
    message, changes = ERRORS[key]
    with fastpo.patched(), pytest.raises(ValueError, match=message):
        trainer("DPO", tmp_path, loss_type=key, **changes)


NOT_QUANTITIES = r"objective: expected parameters named as quantities are, got "
WRONG_FUNCTIONS = {
    "unknown": (lambda difficulty: difficulty, NOT_QUANTITIES + "difficulty"),
    "keywords": (lambda **q: q["chosen_logps"], NOT_QUANTITIES + r"\*\*q"),
    "module": (torch.nn.Identity(), NOT_QUANTITIES + r"\*args"),
    "unbound": (lambda chosen_logps, *, tau: tau * chosen_logps, "tau: expected a value bound"),
    "reduced": (lambda chosen_logps: -chosen_logps.mean(), r"one loss per row, .*got \(\)"),
    "tokens": (lambda chosen_token_logps: -chosen_token_logps, r"one loss per row, .*got \(2, "),
    "pair": (lambda chosen_logps: (-chosen_logps, {}), "one loss per row, .*got tuple"),
}


@pytest.mark.parametrize("case", WRONG_FUNCTIONS)
def test_a_function_of_one_s_own_that_cannot_be_right(case, tmp_path):
    function, message = WRONG_FUNCTIONS[case]
    with fastpo.patched(objective=function), pytest.raises(ValueError, match=message):
        trainer("DPO", tmp_path).train()


def test_a_reference_that_is_no_model():
    for given in ("path/to/model", ["path/to/model"], (None,)):
        with pytest.raises(ValueError, match=r"references\['prev'\]: expected a model, got "):
            fastpo.patch(objective="inpo", references={"prev": given})


def test_a_text_of_another_kind_than_the_others(tmp_path):
    data = tiny.preferences().add_column("third", ["an apple"] * len(tiny.preferences()))
    with (
        fastpo.patched(objective="tpo_triple"),
        pytest.raises(ValueError, match="third: expected a list as chosen is, got a str"),
    ):
        trainer("DPO", tmp_path, data=data)


def test_a_column_without_numbers(tmp_path):
    data = tiny.preferences().add_column("margins", [None] * len(tiny.preferences()))
    with fastpo.patched(objective="dpo"), pytest.raises(ValueError, match="margins: expected"):
        trainer("DPO", tmp_path, data=data).train()


def test_a_list_of_the_wrong_length(tmp_path):
    data = tiny.preferences()
    for side in SIDES:
        data = data.add_column(f"{side}_token_weights", [[1.0]] * len(data))
    with fastpo.patched(objective="mask_dpo"):
        built = trainer("DPO", tmp_path, data=data)
        with pytest.raises(
            ValueError, match=r"expected \d+ values, one per token of chosen_ids, got 1"
        ):
            next(iter(built.get_train_dataloader()))


def test_options_without_an_objective():
    with pytest.raises(
        ValueError, match=r"beta: expected an option of fastpo\.patch, or objective="
    ):
        fastpo.patch(beta=0.1)
    with pytest.raises(ValueError, match="expected hyperparameters among"):
        fastpo.patch(objective="simpo", delta=0.1)


def test_other_models_give_their_quantities(tmp_path):
    others = [tiny.model("llama", seed=seed).train() for seed in (2, 3)]
    with fastpo.patched(objective="mrpo", references={"history": others}):
        built = trainer("DPO", tmp_path, ref_model=tiny.model("llama", seed=1))
        batch = next(iter(built.get_train_dataloader()))
        loss = built.compute_loss(built.model, dict(batch))
    assert not any(x.training or p.requires_grad for x in others for p in x.parameters())
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    each = [naive(model.double(), ids, mask)[0].sum(1).chunk(2) for model in others]
    columns = {
        f"history_{side}_logps": torch.stack([x[i] for x in each]) for i, side in enumerate(SIDES)
    }
    given = pair_quantities(batch, built.model.double(), others[0], columns)
    expected = Quantities(given).rows(objectives.get("mrpo")).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_objectives_run_on_trl_s_own_head(tmp_path):
    """To compare heads: the same losses as with ours, and TRL's head untouched."""
    with fastpo.patched(objective="wpo"):
        expected, _ = _trainers.train(trainer("DPO", tmp_path))
    head = utils._ChunkedLogProbFunction
    with objectives_only(Setting("wpo")):
        assert utils._ChunkedLogProbFunction is head
        logs, _ = _trainers.train(trainer("DPO", tmp_path))
    _trainers.assert_same_logs(logs, expected)


@pytest.mark.parametrize("name", ["_ChunkedLogProbFunction", "maybe_gather_lm_head_ctx"])
def test_a_patch_that_fails_changes_nothing(name, monkeypatch):
    init, waiting = vars(trl.DPOTrainer)["__init__"], imports.waiting()
    monkeypatch.setattr(utils, name, None)
    with pytest.raises(RuntimeError, match=rf"{name}: expected .*, got nothing; trl"):
        fastpo.patch()
    assert vars(trl.DPOTrainer)["__init__"] is init
    assert imports.waiting() == waiting
